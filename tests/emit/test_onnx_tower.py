"""Methods that read the vision tower, in an ONNX folder and in an artifact: the runner passes scores and keys on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qpcompile.capture.capture import capture
from qpcompile.compiled import CompiledVLM, load
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.runner.runner import OnnxVLM, run
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import VISION, Program
from qpcompile.pass_list import passes
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import VISUAL_KEYS, VISUAL_SCORES
from tests.families import qwen2_5_vl

Cases = dict[str, dict[str, torch.Tensor]]
TAKES = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
NEW_TOKENS = 6
FOUR_BITS = "quantize={weights: {solver: rtn}}"
EXACT = "numerics=exact"


@pytest.fixture(scope="module")
def qwen() -> tuple[Program, Cases]:
    """A random Qwen2.5-VL, captured."""
    model, cases = qwen2_5_vl()
    return capture(model, cases["one"], Recipe.load("none")), cases


def compiled(program: Program, method: str, *settings: str) -> CompiledVLM:
    """A copy of a captured program, pruned by a method."""
    recipe = Recipe.load("none").with_overrides([f"tokens.method={method}", "tokens.keep=0.4", EXACT, *settings])
    program = copy.deepcopy(program)
    layers = program.layers
    program.recipe, program.plan = recipe, Plan(recipe=recipe, layers=layers)
    run_passes(program, passes((), 0))
    return CompiledVLM(program)


def check_same_tokens(model: CompiledVLM, folder: Path, cases: Cases) -> None:
    """Greedy tokens of the runner are those of the module, for every prompt and for one without a picture."""
    runner = OnnxVLM(folder, threads=1)
    ids = cases["longer"]["input_ids"][:, -15:]
    text: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in cases["longer"]:
        text["mm_token_type_ids"] = torch.zeros_like(ids)
    for name, case in {**cases, "text": text}.items():
        expected: Any = model.generate(**case, max_new_tokens=NEW_TOKENS, do_sample=False)
        arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in case.items() if key in TAKES}
        assert runner.generate(**arrays, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist(), name


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("visionzip", [FOUR_BITS]),
        ("prumerge_plus", []),
        pytest.param("visionzip", [], marks=pytest.mark.slow),
        pytest.param("prumerge_plus", [FOUR_BITS], marks=pytest.mark.slow),
    ],
)
def test_fixed_size(
    tiny_llava: tuple[Any, Cases], compiled_llava: CompiledVLM, method: str, settings: list[str], tmp_path: Path
) -> None:
    model = compiled(compiled_llava.program, method, *settings)
    export_onnx(model.program, tmp_path / "folder")
    check_same_tokens(model, tmp_path / "folder", tiny_llava[1])
    pictures = tiny_llava[1]["padded"]["pixel_values"]
    found = run(OnnxVLM(tmp_path / "folder", threads=1).vision, {"pixel_values": pictures.numpy()})
    with torch.no_grad():
        expected = model.program.graphs[VISION]({"pixel_values": pictures})
    for name in (VISUAL_SCORES, VISUAL_KEYS):
        np.testing.assert_allclose(found[name].numpy(), expected[name].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [pytest.param("visionzip", marks=pytest.mark.slow), "prumerge_plus"])
def test_any_size(qwen: tuple[Program, Cases], method: str, tmp_path: Path) -> None:
    program, cases = qwen
    model = compiled(program, method)
    export_onnx(model.program, tmp_path / "folder")
    check_same_tokens(model, tmp_path / "folder", cases)


def test_an_artifact_keeps_the_same_tokens(qwen: tuple[Program, Cases], tmp_path: Path) -> None:
    program, cases = qwen
    model = compiled(program, "visionzip", FOUR_BITS)
    model.save_pretrained(tmp_path / "artifact")
    again = load(tmp_path / "artifact")
    for case in cases.values():
        (found,), (expected,) = (each.kept_tokens(**case).values() for each in (again, model))
        assert torch.equal(found, expected)
    export_onnx(again.program, tmp_path / "folder")
    check_same_tokens(model, tmp_path / "folder", {"padded": cases["padded"], "longer": cases["longer"]})
