"""From picture and question to text: the ONNX folder answers as the compiled module and its processor do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
from qpcompile.emit.onnx.runner.answer import Runner
from qpcompile.emit.onnx.runner.chat import Turn
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.recipe.recipe import Recipe
from tests.artifacts import rehash
from tests.tiny_checkpoint import TESTBED, tiny_model

TESTBEDS = TESTBED.parent
NEW_TOKENS = 6
QUESTIONS = ("what color is the star?", "how many objects are there?")
# What a device for deployment may lack, made impossible to import.
ABSENT = ("torch", "transformers", "jinja2", "onnx", "safetensors", "qpcompile", "huggingface_hub")


def picture(number: int, width: int = 60, height: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


def asked(*pictures: Image.Image, question: str = QUESTIONS[0]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": each} for each in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def said(compiled: CompiledVLM, conversation: list[dict[str, Any]], new_tokens: int = NEW_TOKENS) -> str:
    """The module's greedy answer, as `qpcompile run` prints it."""
    inputs = chat_inputs(compiled.processor, [conversation], ["here"])
    made: Any = compiled.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    new = made[:, inputs["input_ids"].shape[1] :]
    return compiled.processor.batch_decode(new, skip_special_tokens=True)[0].strip()


@pytest.fixture(scope="module")
def compiled() -> CompiledVLM:
    """A small random LLaVA with the testbed's processor."""
    processor = AutoProcessor.from_pretrained(TESTBED)
    model = tiny_model()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # So large that answers depend on the prompt.
        parameter.data.normal_(
            0.0, 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1, generator=generator
        )
    inputs = chat_inputs(processor, [[asked(picture(0))]], ["here"])
    return CompiledVLM(capture(model, inputs, Recipe.load("none")), processor)


@pytest.fixture(scope="module")
def folder(compiled: CompiledVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX folder; do not change it."""
    folder = tmp_path_factory.mktemp("onnx") / "speaking"
    compiled.export_onnx(folder)
    return folder


@pytest.fixture(scope="module")
def runner(folder: Path) -> Runner:
    return Runner(folder, threads=1)


def test_answers_are_the_modules(compiled: CompiledVLM, runner: Runner) -> None:
    one, two = picture(1), picture(2, 90, 30)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS}
    assert runner.answer(one, QUESTIONS[0], **options) == said(compiled, [asked(one)])
    assert runner.answer([one, two], QUESTIONS[1], **options) == said(
        compiled, [asked(one, two, question=QUESTIONS[1])]
    )
    assert runner.answer(None, QUESTIONS[1], **options) == said(compiled, [asked(question=QUESTIONS[1])])
    reply = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    wanted = said(compiled, [asked(one), reply, asked(two, question=QUESTIONS[1])])
    assert runner.answer(two, QUESTIONS[1], [(one, QUESTIONS[0], "red")], **options) == wanted


def test_a_batch_answers_as_each_alone(runner: Runner) -> None:
    pictures = [picture(3), [picture(4), picture(5)], None]
    questions = [QUESTIONS[0], QUESTIONS[1], "what is that?"]
    alone = [runner.answer(*each, max_new_tokens=5) for each in zip(pictures, questions, strict=True)]
    assert runner.answers(pictures, questions, max_new_tokens=5) == alone
    with pytest.raises(RunnerError, match="1 pictures were given for 3 questions"):
        runner.answers([None], questions)


def test_sampling_begins_at_the_seed(runner: Runner) -> None:
    options = [{"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 2, "top_k": 1}, {"temperature": 0}]
    given: list[dict[str, Any]] = [{"max_new_tokens": 8, "temperature": 5.0} | each for each in options]
    first, again, other, likeliest, greedy = (runner.answer(picture(6), QUESTIONS[0], **each) for each in given)
    assert first == again != other and likeliest == greedy
    assert "".join(runner.stream(picture(6), QUESTIONS[0], **given[0])).strip() == first
    impossible: dict[str, Any] = {"temperature": -1.0, "top_p": 2.0, "top_k": -1, "seed": -1, "max_new_tokens": 0}
    for name, value in impossible.items():
        with pytest.raises(RunnerError, match=name):
            runner.answer(None, QUESTIONS[0], **{name: value})


def test_stop_tokens_end_an_answer(runner: Runner) -> None:
    given: dict[str, Any] = runner.chat.inputs([[Turn((picture(7),), QUESTIONS[0])]])
    ids = given["input_ids"]
    whole = runner.model.generate(**given, max_new_tokens=5)[0, ids.shape[1] :].tolist()
    stop = whole[2]
    before = runner.model.generation
    try:
        runner.model.generation = before | {"eos_token_id": [stop]}
        parts = list(runner.stream(picture(7), QUESTIONS[0], max_new_tokens=5))
        two = runner.answers([picture(7), picture(5)], QUESTIONS, max_new_tokens=5)
    finally:
        runner.model.generation = before
    assert "".join(parts) == runner.chat.text(whole[: whole.index(stop) + 1])
    assert two[0] == "".join(parts).strip()


def without_packages(place: Path) -> dict[str, str]:
    """The environment of a device that has onnxruntime, numpy, pillow and tokenizers alone."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in ABSENT)]
    (place / "sitecustomize.py").write_text("\n".join(lines))
    return {"PYTHONPATH": str(place), "PATH": "", "OMP_NUM_THREADS": "1"}


def test_the_folder_answers_without_torch_and_transformers(runner: Runner, folder: Path, tmp_path: Path) -> None:
    picture(8).save(tmp_path / "photo.png")
    environment = without_packages(tmp_path)
    gone = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, check=False)
    assert gone.returncode == 1

    def ask(*words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(folder / "runner.py"), "--image", "photo.png", "--max-new-tokens", "4", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, input=typed, capture_output=True, text=True, check=False
        )

    first = runner.answer(picture(8), QUESTIONS[0], max_new_tokens=4)
    second = runner.answer(None, QUESTIONS[1], [(picture(8), QUESTIONS[0], first)], max_new_tokens=4)
    assert ask("--question", QUESTIONS[0]).stdout == first + "\n"
    chat = ask(typed="\n".join([QUESTIONS[0], "", QUESTIONS[1]]))
    assert chat.stdout == f"{first}\n{second}\n" and not chat.stderr
    wrong = ask("--question", "what <image>?")
    assert wrong.returncode == 1 and "is a token of the model" in wrong.stderr and "Traceback" not in wrong.stderr
    assert ask("--question", "x", str(folder), "in.npz").returncode == 2


def test_the_command_line_runs_a_folder(runner: Runner, folder: Path, tmp_path: Path) -> None:
    picture(9).save(tmp_path / "photo.png")

    def ask(question: str) -> Any:
        words = ["run", str(folder), "--image", str(tmp_path / "photo.png"), "--question", question]
        return CliRunner().invoke(app, [*words, "--max-new-tokens", "3"])

    assert ask(QUESTIONS[0]).stdout == runner.answer(picture(9), QUESTIONS[0], max_new_tokens=3) + "\n"
    wrong = ask("what <image>?")
    assert wrong.exit_code == 1 and "is a token of the model" in wrong.output and "what to do: " in wrong.output


def test_readme_has_commands_that_run(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "python runner.py --image photo.png --question" in text and "pip install onnxruntime numpy" in text
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"README.md", "tokenizer.json", "pictures.json", "chat.json"} <= set(listed)
    assert all(name in text for name in listed if name not in ("README.md", "runner.py"))


def test_a_folder_that_takes_token_ids_says_why(
    compiled: CompiledVLM, plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RunnerError, match="takes token ids"):
        Runner(plain)
    template = compiled.processor.chat_template
    try:
        compiled.processor.chat_template = "{{ strftime_now('%d') }}" + template
        compiled.export_onnx(tmp_path / "out")
    finally:
        compiled.processor.chat_template = template
    assert "the chat template reads the clock" in caplog.text
    assert "the chat template reads the clock" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "chat.json").exists()


def no_tokenizer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def unknown_setting(folder: Path) -> None:
    (folder / "pictures.json").write_text(json.dumps({"kind": "fixed", "video": 1}))


def other_tokens(folder: Path) -> None:
    settings = json.loads((folder / "pictures.json").read_text())
    (folder / "pictures.json").write_text(json.dumps(settings | {"tokens": 5}))


def other_size(folder: Path) -> None:
    settings = json.loads((folder / "pictures.json").read_text())
    (folder / "pictures.json").write_text(json.dumps(settings | {"crop": [40, 40]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_tokenizer, "does not list tokenizer.json"),
        (unknown_setting, "unknown or missing: .*video"),
        (other_tokens, "has 5 image tokens .* the pictures give 144"),
        (other_size, "pixel_values is"),
    ],
)
def test_hostile_settings(damage: Callable[[Path], None], message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for path in folder.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / "copy")
    rehash(tmp_path / "copy")
    with pytest.raises(RunnerError, match=message) as error:
        Runner(tmp_path / "copy", threads=1).answer(picture(1), QUESTIONS[0])
    assert error.value.where and error.value.do


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_testbeds_answer_as_the_module(name: str, tmp_path: Path) -> None:
    data = TESTBEDS / "calibration" / name
    model = qpcompile.compile(TESTBEDS / name, "none", calibration=data)
    model.export_onnx(tmp_path / "out")
    runner = Runner(tmp_path / "out", threads=1)
    for question in read_data(data)[:20]:
        seen = Image.open(question.picture)
        wanted = said(model, [asked(seen, question=question.question)], new_tokens=8)
        assert runner.answer(question.picture, question.question, max_new_tokens=8) == wanted
