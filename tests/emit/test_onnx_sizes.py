"""ONNX folders with a vision graph for each size of picture, and decoders that take their mask as a table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qpcompile.capture.capture import capture
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx import check
from qpcompile.emit.onnx.export import OWN, TORCH
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.masks import MASKS, MaskRule, read_masks, tables
from qpcompile.emit.onnx.runner.runner import OnnxVLM
from qpcompile.emit.onnx.runner.sizes import SIZES, Size, read_sizes, sized_positions, split_pictures, takes_several
from qpcompile.emit.onnx.sized import sized_pictures
from qpcompile.errors import ExportError
from qpcompile.recipe.recipe import Recipe
from tests.families import gemma3, qwen3_vl, smolvlm

Cases = dict[str, dict[str, Any]]


def arrays(case: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value) for name, value in case.items()}


def check_answers(model: CompiledVLM, folder: Path, cases: Cases) -> None:
    """The runner's greedy tokens are the module's."""
    runner = OnnxVLM(folder, threads=1)
    for name, case in cases.items():
        expected: Any = model.generate(**case, max_new_tokens=5, do_sample=False)
        assert runner.generate(**arrays(case), max_new_tokens=5).tolist() == expected.tolist(), name


def one_of_each(cases: Cases) -> list[dict[str, Any]]:
    """The prompts with one row and a picture."""
    return [case for case in cases.values() if len(case["input_ids"]) == 1 and "pixel_values" in case]


@pytest.mark.parametrize(
    "family", [qwen3_vl, pytest.param(smolvlm, marks=pytest.mark.slow)], ids=["deepstack", "dropped_views"]
)
def test_a_graph_for_each_size(family: Any, tmp_path: Path) -> None:
    model, cases = family()
    compiled = CompiledVLM(capture(model, cases["one"], Recipe.load("none")))
    with pytest.raises(ExportError):
        compiled.export_onnx(tmp_path / "without")
    compiled.export_onnx(tmp_path / "onnx", check=one_of_each(cases))
    sizes = json.loads((tmp_path / "onnx" / SIZES).read_text())["sizes"]
    assert [size["graph"] for size in sizes] == ["vision.onnx", "vision.1.onnx"][: len(sizes)]
    assert json.loads((tmp_path / "onnx" / "check.json").read_text())["different"] == []
    check_answers(compiled, tmp_path / "onnx", cases)


def test_masks_as_tables(tmp_path: Path) -> None:
    """Scaled embeddings, windows, and pictures whose tokens see each other."""
    model, cases = gemma3()
    compiled = CompiledVLM(capture(model, cases["one"], Recipe.load("none")))
    with pytest.raises(ExportError, match="whose rule is found on samples"):
        compiled.export_onnx(tmp_path / "without")
    compiled.export_onnx(tmp_path / "onnx", check=one_of_each(cases))
    rules = json.loads((tmp_path / "onnx" / MASKS).read_text())["masks"]
    assert {rule["together"] for rule in rules.values()} == {"pictures"}
    check_answers(compiled, tmp_path / "onnx", cases)


def test_a_constant_of_the_pixels_is_refused(
    compiled_llava: CompiledVLM, tiny_llava: tuple[Any, Cases], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that left the trace, here through numpy, would be the sample's for every picture."""
    program, sample = copy.deepcopy(compiled_llava.program), tiny_llava[1]["one"]
    assert len(sized_pictures(program, [sample], {*TORCH, *OWN})) == 1
    owner: Any = type(program.host.get_submodule("model"))
    original, means = owner.get_image_features, []

    def brighter(self: Any, pixel_values: torch.Tensor, *args: Any, **named: Any) -> Any:
        means.append(float(pixel_values.detach().numpy().mean()))
        return original(self, pixel_values + 100 * means[-1], *args, **named)

    monkeypatch.setattr(owner, "get_image_features", brighter)
    with pytest.raises(ExportError, match="the trace gives other features"):
        sized_pictures(program, [sample], {*TORCH, *OWN})
    assert means[0] != 0


def test_a_sample_is_needed(compiled_llava: CompiledVLM, tiny_llava: tuple[Any, Cases]) -> None:
    with pytest.raises(ExportError, match="needs a sample of it"):
        sized_pictures(compiled_llava.program, [tiny_llava[1]["padded"]], {*TORCH, *OWN})


def size(tokens: int, rows: int, grid: list[int], positions: Any = None, advance: Any = ()) -> Size:
    return Size(
        f"{tokens}.onnx", tokens, {"grid": np.array([grid])}, positions, np.array(advance), {"pixel_values": (rows, 2)}
    )


def test_pictures_are_told_apart() -> None:
    sizes = [size(3, 4, [2, 2]), size(2, 6, [3, 2])]
    pixels = np.arange(28.0).reshape(14, 2)
    given = {"pixel_values": pixels, "grid": np.array([[3, 2], [2, 2], [2, 2]])}
    visual = np.array([[0, 1, 1, 0, 1, 1, 1, 1, 1, 1]], bool)
    found = split_pictures(sizes, given, visual)
    assert [each.tokens for each, _ in found] == [2, 3, 3]
    assert [part["pixel_values"][0, 0] for _, part in found] == [0, 12, 20]
    assert split_pictures(sizes, {}, ~visual & False) == []


@pytest.mark.parametrize(
    ("grid", "tokens", "message"),
    [([[5, 2]], 2, "picture 1 has a size"), ([[3, 2]], 3, "picture 2 has a size"), ([[3, 2]] * 2, 2, "more pictures")],
)
def test_other_sizes_are_refused(grid: list[list[int]], tokens: int, message: str) -> None:
    given = {"pixel_values": np.zeros((6 * len(grid), 2)), "grid": np.array(grid)}
    with pytest.raises(RunnerError, match=message):
        split_pictures([size(2, 6, [3, 2])], given, np.ones((1, tokens), bool))


def test_pictures_side_by_side() -> None:
    """Along another axis than the first."""
    wide = Size("a", 1, {}, None, np.array([]), {"pixel_values": (1, 3, 4)})
    found = split_pictures([wide], {"pixel_values": np.arange(24).reshape(1, 3, 8)}, np.array([[True, False, True]]))
    assert [part["pixel_values"][0, 0, 0] for _, part in found] == [0, 4]


def test_positions_of_a_size() -> None:
    spread = size(2, 1, [1, 2], np.array([[0, 1], [0, 5]]), [2, 3])
    visual = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]], bool)
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = sized_positions(visual, mask, [spread, spread], 2)
    assert found[:, 0].tolist() == [[0, 0, 1, 2, 3], [0, 0, 1, 6, 4]]
    assert found[:, 1].tolist() == [[0, 1, 2, 3, 4], [0, 1, 6, 4, 5]]


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        (MaskRule(), ["1000", "1100", "1110", "1111"]),
        (MaskRule(window=2), ["1000", "1100", "0110", "0011"]),
        (MaskRule(chunk=2), ["1000", "1100", "0010", "0011"]),
        (MaskRule(window=2, together="pictures"), ["1000", "1110", "0110", "0011"]),
        (MaskRule(together="prompt"), ["1111"] * 4),
    ],
)
def test_rules_of_masks(rule: MaskRule, rows: list[str]) -> None:
    wanted = np.array([[letter == "1" for letter in row] for row in rows])
    visual = np.array([[False, True, True, False]])
    assert np.array_equal(rule.table(np.ones((1, 4)), visual)[0, 0], wanted)
    padded = rule.table(np.array([[0, 1, 1, 1]]), visual)[0, 0]
    assert not padded[:, 0].any() and np.array_equal(padded[:, 1:], wanted[:, 1:])
    last = MaskRule(rule.window, rule.chunk).table(np.ones((1, 4)), np.zeros((1, 4), bool))[0, 0, -1:]
    assert np.array_equal(rule.table(np.ones((1, 4)))[0, 0], last)


@pytest.mark.parametrize(
    ("margins", "strict", "refused"),
    [
        ([1.6], True, True),
        ([1.6], False, False),
        ([1.6, 1.0], False, True),
        ([0.01] * 3, True, False),
        ([], True, False),
    ],
)
def test_wrong_answers_are_refused(
    margins: list[float], strict: bool, refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Near ties may be answered otherwise; more than that is a graph that does something else."""
    differences = tuple(check.Difference(row, 0, 1, 2, margin) for row, margin in enumerate(margins))
    monkeypatch.setattr(check, "compare", lambda *_: check.Comparison(3, differences))
    if refused:
        with pytest.raises(ExportError, match="are not the module's"):
            check.accepted(len, tmp_path, [], strict)
    else:
        assert check.accepted(len, tmp_path, [], strict).different == differences


def test_a_folder_that_does_not_answer_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not answer: there is no such folder"):
        check.compare(len, tmp_path / "none", [])


HUGE = "x" * 2**18
ENTRY: dict[str, Any] = {"graph": "vision.onnx", "tokens": 2, "values": {}, "positions": None, "advance": []}
DAMAGED: dict[str, dict[str, Any]] = {
    "nothing": {"graph": None},
    "graph that is a list": {"graph": ["vision.onnx"]},
    "graph of another folder": {"graph": "../vision.onnx"},
    "no tokens": {"tokens": 0},
    "values that are a list": {"values": []},
    "one number": {"values": {"grid": 5}},
    "texts of which numpy makes gigabytes": {"values": {"grid": [HUGE, *[""] * 2**14]}},
    "rows of several lengths": {"values": {"grid": [[1], [2, 3]]}},
    "fractions": {"values": {"grid": [0.5]}},
    "objects": {"values": {"grid": [{}]}},
    "numbers that no picture has": {"values": {"grid": [2**62]}},
    "positions of fewer tokens": {"positions": [[0]], "advance": [1]},
    "positions that overflow": {"positions": [[0, 2**63 - 1]], "advance": [1]},
    "advance of nothing": {"advance": None},
}


@pytest.mark.parametrize("changes", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_size_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    shapes = {"vision.onnx": {"pixel_values": (1, 3, 4)}}
    path = tmp_path / SIZES
    path.write_text(json.dumps({"sizes": [ENTRY]}))
    assert read_sizes(path, shapes)[0].tokens == 2
    path.write_text(json.dumps({"sizes": [ENTRY | changes]}))
    with pytest.raises(RunnerError) as error:
        read_sizes(path, shapes)
    assert error.value.where and error.value.do and len(str(error.value)) < 2000


@pytest.mark.parametrize("said", [None, 1, "true", []])
def test_a_file_says_whether_several_pictures_were_compared(said: Any, tmp_path: Path) -> None:
    path = tmp_path / SIZES
    path.write_text(json.dumps({"several": True}))
    assert takes_several(path)
    path.write_text(json.dumps({"several": said}))
    with pytest.raises(RunnerError, match="several pictures"):
        takes_several(path)


@pytest.mark.parametrize("entry", [{}, {"window": 0, "chunk": 0, "together": "all"}, {"window": -1, "chunk": 0}])
def test_a_damaged_rule_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(RunnerError):
        MaskRule.read(entry, "masks.json")


@pytest.mark.parametrize("names", [["input_ids"], ["other"], [f"attention_mask.{at}" for at in range(17)]], ids=len)
def test_rules_of_no_mask_are_refused(names: list[str], tmp_path: Path) -> None:
    """Each rule makes a table as large as the square of the prompt."""
    entry = {"window": 0, "chunk": 0, "together": "none"}
    path = tmp_path / MASKS
    path.write_text(json.dumps({"masks": {"attention_mask.full_attention": entry, "attention_mask": entry}}))
    made = tables(read_masks(path), np.ones((1, 3)))
    assert made["attention_mask"] is made["attention_mask.full_attention"]
    path.write_text(json.dumps({"masks": dict.fromkeys(names, entry)}))
    with pytest.raises(RunnerError, match="masks"):
        read_masks(path)
