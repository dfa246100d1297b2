"""Folders for onnxruntime-genai: it gives the tokens of the folder's own runner, and what it cannot do is refused.

Without the package a stand-in runs the pipeline; with `pip install "qpcompile[genai]"` both do.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import genai_stand_in
import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

import qpcompile
from qpcompile.capture.capture import capture
from qpcompile.capture.chat import chat_inputs
from qpcompile.cli.main import app
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx import genai as writer
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.genai import check_settings, opened_by
from qpcompile.emit.onnx.runner import genai
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.genai import CONFIG, GenaiRunner
from qpcompile.emit.onnx.runner.runner import OnnxVLM
from qpcompile.errors import ExportError
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine
from tests.emit.test_onnx import CUTS, Cases, arrays, compiled
from tests.emit.test_onnx_answer import asked, picture, said
from tests.families import WIDE_QWEN, llava, qwen2_5_vl
from tests.tiny_checkpoint import TESTBED, tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy-genai.md").read_text("utf-8")
NEW_TOKENS, STOP, QUESTION = 8, 98, "what is in the picture?"
slow = pytest.mark.slow
FIXED = "quantize.transform=hadamard"


def captured(name: str) -> tuple[Program, Cases]:
    """A random model whose heads onnxruntime's attention takes, with a stop token."""
    model, cases = llava(head_dim=16) if name == "llava" else qwen2_5_vl(**WIDE_QWEN)
    model.generation_config.eos_token_id = STOP  # type: ignore[union-attr]
    return capture(model, cases["one"], Recipe.load("none")), cases


@pytest.fixture(scope="module")
def tiny() -> tuple[Program, Cases]:
    return captured("llava")


@pytest.fixture(scope="module")
def quota(tiny: tuple[Program, Cases], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cuts in the decoder, 4-bit weights, a cache of 8 bits; do not change it."""
    folder = tmp_path_factory.mktemp("genai") / "quota"
    export_onnx(compiled(*tiny, "quota-30", CUTS, FIXED), folder, target="genai")
    return folder


@pytest.fixture(params=["stand-in", "onnxruntime-genai"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who runs the pipeline."""
    if request.param == "stand-in":
        monkeypatch.setattr(genai, "package", lambda: genai_stand_in)
    else:
        pytest.importorskip("onnxruntime_genai", reason='run: pip install "qpcompile[genai]"')
    return request.param


def check_tokens(folder: Path, cases: Cases) -> list[list[int]]:
    """Tokens as those of the folder's own runner, for every prompt of one row and one without a picture."""
    ours, runner = OnnxVLM(folder, threads=1), GenaiRunner(folder, threads=1)
    prompts = [arrays(case) for case in cases.values() if len(case["input_ids"]) == 1]
    prompts.append({"input_ids": prompts[0]["input_ids"][:, -5:]})
    found: list[list[int]] = []
    for given in prompts:
        start = given["input_ids"].shape[1]
        wanted = ours.generate(**given, max_new_tokens=NEW_TOKENS)[0, start:].tolist()
        found.append(list(runner.tokens(**given, max_new_tokens=NEW_TOKENS)))
        assert found[-1] == wanted[: wanted.index(STOP) if STOP in wanted else None]
    assert len(found) > 3 and len({tuple(each) for each in found}) > 1
    return found


def test_cuts_and_a_quantized_cache(quota: Path, tiny: tuple[Program, Cases], engine: str) -> None:
    check_tokens(quota, tiny[1])


@pytest.mark.parametrize(
    ("family", "preset", "settings"),
    [
        ("llava", "none", ()),
        pytest.param("llava", "prune-30", (CUTS,), marks=slow),
        pytest.param("llava", "prune-30", ("tokens.method=divprune",), marks=slow),
        pytest.param("llava", "prune-30", ("tokens.method=visionzip",), marks=slow),
        pytest.param("qwen2_5_vl", "none", (), marks=slow),
        pytest.param("qwen2_5_vl", "quota-30", (CUTS, FIXED), marks=slow),
    ],
)
def test_tokens_are_the_modules_where_nothing_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, preset: str, settings: tuple[str, ...]
) -> None:
    """Both engines on one folder: compiling takes longer than answering."""
    program, cases = captured(family)
    program = compiled(program, cases, preset, *settings)
    export_onnx(program, tmp_path / "out", target="genai")
    single = [case for case in cases.values() if len(case["input_ids"]) == 1]
    machine = Machine(program)
    for each in (genai_stand_in, _installed()):
        if each is None:
            continue
        monkeypatch.setattr(genai, "package", lambda each=each: each)
        found = check_tokens(tmp_path / "out", cases)
        for case, tokens in zip(single, found, strict=False):
            made = machine.generate(**case, max_new_tokens=NEW_TOKENS, do_sample=False)
            wanted = made[0, case["input_ids"].shape[1] :].tolist()
            assert preset == "quota-30" or tokens == wanted[: len(tokens)]


def _installed() -> Any:
    try:
        return genai.package()
    except RunnerError:
        return None


def test_a_step_is_told_what_the_runner_tells_it(quota: Path) -> None:
    """Positions of kept tokens grow by the new token's; the next step finds them as they are now."""
    session: Any = ort.InferenceSession(quota / "genai_step.onnx")
    kept, alive = np.array([[0, 2, 5]]), np.array([[True, False, True]])
    feeds: dict[str, Any] = {"attention_mask": np.ones((1, 8), np.int64)}
    for cut in (0, 1):
        feeds |= {f"kept.{cut}.before": kept + cut, f"alive.{cut}.before": alive}
    names = [entry.name for entry in session.get_outputs()]
    found = dict(zip(names, session.run(names, feeds), strict=True))
    assert found.pop("tokens_seen").tolist() == [*range(7)]
    for cut in (0, 1):
        for prefix in ("", "present."):
            assert found.pop(f"{prefix}kept.{cut}").tolist() == [[cut, 2 + cut, 5 + cut, 7]]
            assert found.pop(f"{prefix}alive.{cut}").tolist() == [[True, False, True, True]]
    assert not found


def test_a_prompt_is_one_and_the_first(quota: Path) -> None:
    session: Any = ort.InferenceSession(quota / "genai_prompt.onnx")
    token = json.loads((quota / "config.json").read_text())["image_token_id"]
    ids = np.array([[1, token, token, 2]])
    visual, valid, count = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert (visual.tolist(), valid.tolist(), count.tolist()) == (
        [[False, True, True, False]],
        [[True] * 4],
        [0, 1],
    )
    for rows, length in ((2, 4), (1, 5)):
        feeds = {"input_ids": ids.repeat(rows, 0), "attention_mask": np.ones((rows, length), np.int64)}
        with pytest.raises(Exception, match=r"invalid dimensions|Reshape"):
            session.run(None, feeds)


def test_the_package_refuses_more_than_one_prompt(quota: Path, tiny: tuple[Program, Cases]) -> None:
    og: Any = pytest.importorskip("onnxruntime_genai")
    case, model = arrays(tiny[1]["one"]), og.Model(str(quota))
    ids = case["input_ids"].astype(np.int32)

    def begun(**options: int) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=99, **options)
        generator = og.Generator(model, params)
        generator.set_model_input("pixel_values", case["pixel_values"])
        return generator

    with pytest.raises(Exception, match="invalid dimensions"):
        begun(batch_size=2).append_tokens(ids.repeat(2, 0).ravel())
    with pytest.raises(Exception, match="invalid dimensions"):
        begun(num_beams=2).append_tokens(ids[0])
    generator = begun()
    generator.append_tokens(ids[0])
    generator.generate_next_token()
    with pytest.raises(Exception, match="Reshape"):
        generator.append_tokens(ids[0][:4])


def test_prompts_that_are_refused(quota: Path, tiny: tuple[Program, Cases], engine: str) -> None:
    runner = GenaiRunner(quota)
    one = arrays(tiny[1]["one"])
    ids = one["input_ids"]
    text = ids[:, -4:]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("one prompt of two tokens or more", arrays(tiny[1]["padded"])),
        ("one prompt of two tokens or more", {"input_ids": text[:, :1]}),
        ("one prompt of two tokens or more", {"input_ids": text, "attention_mask": np.array([[0, 1, 1, 1]])}),
        ("are more than", {"input_ids": text, "max_new_tokens": 2**19}),
        ("num_beams cannot be set", {"input_ids": text, "num_beams": 2}),
        ("max_new_tokens is 0", {"input_ids": text, "max_new_tokens": 0}),
        ("does not run this prompt", one | {"pixel_values": one["pixel_values"][:, :, :5], "max_new_tokens": 2}),
    ]
    for message, given in wrong:
        with pytest.raises(RunnerError, match=message):
            list(runner.tokens(**given))
    with pytest.raises(RunnerError, match=r"no chat.json"):
        runner.answer(None, QUESTION)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("min_new_tokens", 2, "has no min_new_tokens"),
        ("suppress_tokens", [3], "has no suppress_tokens"),
        ("begin_suppress_tokens", [3], "has no begin_suppress_tokens"),
        ("eos_token_id", None, "no stop token"),
    ],
)
def test_settings_that_are_refused(
    tiny: tuple[Program, Cases], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, said: str
) -> None:
    host: Any = tiny[0].host
    check_settings(tiny[0])
    monkeypatch.setattr(host.generation_config, name, value)
    with pytest.raises(ExportError, match=said) as error:
        export_onnx(tiny[0], tmp_path / "out", target="genai")
    assert error.value.where == "compiled.generation_config" and not list(tmp_path.iterdir())


def test_a_model_without_a_longest_prompt(tiny: tuple[Program, Cases]) -> None:
    host: Any = tiny[0].host
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=99))
    program: Any = SimpleNamespace(host=SimpleNamespace(config=config, generation_config=host.generation_config))
    with pytest.raises(ExportError, match="how many tokens it takes"):
        check_settings(program)


def test_without_the_package(quota: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    assert opened_by(quota) is None
    with pytest.raises(RunnerError, match="pip install onnxruntime-genai"):
        GenaiRunner(quota)


def test_the_package_has_the_last_word(quota: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        __version__ = "9"

        def Model(self, folder: str) -> None:
            raise RuntimeError("Unknown value\nmore")

    monkeypatch.setattr(genai, "package", Refusing)
    with pytest.raises(ExportError, match=r"onnxruntime-genai 9 does not open the folder: Unknown value\n  where"):
        opened_by(quota)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompiledVLM, Path]:
    """A small random LLaVA with the testbed's processor, and a place with its compiled folder `out` and a picture."""
    processor, model = AutoProcessor.from_pretrained(TESTBED), tiny_model()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(
            0.0, 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1, generator=generator
        )
    inputs = chat_inputs(processor, [[asked(picture(0))]], ["here"])
    program = capture(model, inputs, Recipe.load("none"))
    run_passes(program, [Canonicalize()])
    made = CompiledVLM(program, processor)
    place = tmp_path_factory.mktemp("genai")
    made.save_pretrained(place / "out")
    picture(8).save(place / "photo.png")
    return made, place


def test_the_commands_of_the_page(speaking: tuple[CompiledVLM, Path]) -> None:
    """The page's shell lines and its first lines of Python, in a folder that has `out/` and `photo.png`."""
    made, place = speaking
    export, _, ask = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)[0].splitlines()
    words = export.partition("#")[0].split()[1:]
    folder = place / words[words.index("--output") + 1]
    done = CliRunner().invoke(app, [str(place / each) if each.endswith("/") else each for each in words])
    assert done.exit_code == 0, done.output
    check = json.loads((folder / "check.json").read_text())["runtime"]
    assert check["name"] == "genai" and check["problems"] == [] and check["fast"]
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {CONFIG, writer.RUNNER, "genai_prompt.onnx", "genai_step.onnx"} <= set(listed)
    assert "genai_runner.py" in (folder / "README.md").read_text() and "qpcompile" not in (
        folder / writer.RUNNER
    ).read_text("utf-8")
    command = [sys.executable, *[word.strip('"') for word in re.findall(r'"[^"]*"|\S+', ask)[1:]]]
    absent = "".join(f"sys.modules[{name!r}] = None\n" for name in ("torch", "transformers", "qpcompile", "onnx"))
    (place / "sitecustomize.py").write_text(f"import sys\n{absent}")
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    asked_here = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    installed = _installed()
    assert check["opened_by"] == (installed and installed.__version__)
    if installed is None:
        assert asked_here.returncode == 1 and "pip install onnxruntime-genai" in asked_here.stderr
        return
    longest = json.loads((folder / "generation_config.json").read_text())["max_new_tokens"]
    wanted = said(made, [asked(picture(8), question=QUESTION)], longest)
    assert (asked_here.stdout, asked_here.returncode) == (f"{wanted}\n", 0), asked_here.stderr
    prompt: dict[str, Any] = arrays(chat_inputs(made.processor, [[asked(picture(8), question=QUESTION)]], ["here"]))
    names = {"input_ids": prompt["input_ids"][0], "pixels": prompt["pixel_values"]}
    ours, alone = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (place / "ours.py").write_text(f"import numpy, sys\nsys.path.insert(0, {str(folder)!r})\n{_given(names)}{ours}")
    (place / "alone.py").write_text(f"import numpy\n{_given(names)}{alone}")
    for name in ("ours.py", "alone.py"):
        ran = subprocess.run(
            [sys.executable, name], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
    new = made.generate(
        **chat_inputs(made.processor, [[asked(picture(8), question=QUESTION)]], ["here"]),
        max_new_tokens=32,
        do_sample=False,
    )[0, len(names["input_ids"]) :]
    assert [int(each) for each in re.findall(r"\d+", ran.stdout)] == new.tolist()


def _given(names: dict[str, Any]) -> str:
    return "".join(f"{name} = numpy.array({value.tolist()}, numpy.{value.dtype})\n" for name, value in names.items())


def test_chats_are_answered_as_by_the_module(speaking: tuple[CompiledVLM, Path], engine: str, tmp_path: Path) -> None:
    made, _ = speaking
    made.export_onnx(tmp_path / "out", target="genai")
    runner = GenaiRunner(tmp_path / "out", threads=1)
    one, two = picture(1), picture(2, 90, 30)
    assert runner.answer([one, two], QUESTION, max_new_tokens=6) == said(made, [asked(one, two, question=QUESTION)])
    assert runner.answer(None, QUESTION, max_new_tokens=6) == said(made, [asked(question=QUESTION)])
    reply = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    wanted = said(made, [asked(one), reply, asked(two, question=QUESTION)])
    assert runner.answer(two, QUESTION, [(one, "what color is the star?", "red")], max_new_tokens=6) == wanted


@slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_testbeds(family: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained models: all answers to unseen questions are the module's."""
    monkeypatch.syspath_prepend(TESTBED.parent)
    scenes = importlib.import_module("scenes")
    place = TESTBED.parent / family
    made = qpcompile.compile(str(place), "none", calibration=str(TESTBED.parent / "calibration" / family))
    made.export_onnx(tmp_path / "out", target="genai")
    runner = GenaiRunner(tmp_path / "out", threads=1)
    for pixels, question in scenes.samples(family, 7, 20):
        seen = Image.fromarray(pixels)
        assert runner.answer(seen, question.text) == said(made, [asked(seen, question=question.text)])
