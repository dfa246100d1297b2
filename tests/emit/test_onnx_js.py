"""JavaScript: `qpcompile.js` of an exported folder answers as the folder's `runner.py` does.

Tests that run node need its packages: `make tests/js/node_modules`.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import qpcompile
from qpcompile.capture.capture import capture
from qpcompile.capture.chat import chat_inputs
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.js_file import EXPORTED, PARTS, js_text
from qpcompile.emit.onnx.runner.answer import Runner
from qpcompile.emit.onnx.runner.pictures import Pictures
from qpcompile.emit.onnx.runner.runner import Steps
from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.pipeline import compile_captured
from qpcompile.recipe.recipe import Recipe
from tests.emit.test_onnx_answer import asked, picture
from tests.tiny_checkpoint import TESTBED, tiny_model

JS = Path(__file__).resolve().parents[1] / "js"
SOURCE = Path(qpcompile.__file__).parent / "emit" / "onnx" / "js"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_packages = pytest.mark.skipif(
    NODE is None or not (JS / "node_modules").is_dir(), reason="run: make tests/js/node_modules (needs npm)"
)
QUESTION = "what color is the star?"
CUTS = ("tokens.method=fastv", "tokens.keep=0.4", "tokens.candidate_layers=[0]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random LLaVA with a cut after its first layer, exported; do not change it."""
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
    program = capture(model, inputs, Recipe.load("none").with_overrides([*CUTS]))
    folder = tmp_path_factory.mktemp("onnx") / "out"
    CompiledVLM(compile_captured(program, None, None).program, processor).export_onnx(folder)
    return folder


def node(*words: Any, given: Any) -> list[dict[str, Any]]:
    """Run a script of tests/js; its lines of output."""
    command = [str(NODE), *map(str, words)]
    done = subprocess.run(command, cwd=JS, input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Watched(Runner):
    """A runner that tells which visual tokens each cut of the last prompt kept."""

    def told(self, seen: Any, question: str, history: Any = (), **options: Any) -> dict[str, Any]:
        """The same as a line of ask.mjs, without the places of pictures."""
        steps: list[Steps] = []

        class Noted(Steps):
            def prefill(self, ids: Any, pictures: Any) -> Any:
                logits = super().prefill(ids, pictures)
                visual = np.flatnonzero(ids[0] == self.model.image_token)
                for name in [name for name in self.state if name.startswith("kept.")]:
                    layer = name.removeprefix("kept.")
                    alive = self.state[f"alive.{layer}"].numpy()[0]
                    kept = np.isin(visual, self.state[name].numpy()[0][alive]).astype(int).tolist()
                    cuts.append({"layer": int(layer), "kept": kept})
                steps.append(self)
                return logits

        cuts: list[dict[str, Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qpcompile.emit.onnx.runner.runner.Steps", Noted)
            tokens = list(self._ids(seen, question, history, options))  # type: ignore[arg-type]
        assert steps
        return {"text": self.chat.text(tokens), "tokens": tokens, "cuts": cuts}


NAMES = {"maxNewTokens": "max_new_tokens", "topK": "top_k", "topP": "top_p"}


def check_same(folder: Path, questions: list[tuple[Any, str, dict[str, Any]]], runtime: str) -> None:
    """Every answer, its tokens and the kept visual tokens are those of the Python runner."""
    runner = Watched(folder, threads=1)
    found = node("ask.mjs", folder, runtime, given=questions)
    assert len(found) == len(questions)
    for (seen, question, options), line in zip(questions, found, strict=True):
        given = {NAMES.get(name, name): value for name, value in options.items()}
        history = [(turn["picture"], turn["question"], turn["answer"]) for turn in given.pop("history", [])]
        line.pop("pictures")
        assert line == runner.told(seen, question, history, **given), question


def questions(place: Path) -> list[tuple[Any, str, dict[str, Any]]]:
    """Chats with none, one and two pictures, with and without chance and an earlier turn."""
    for number, size in enumerate([(60, 80), (90, 30)]):
        picture(number, *size).save(place / f"{number}.png")
    Image.new("RGBA", (40, 50), (200, 10, 10, 120)).save(place / "clear.png")
    picture(2, 50, 40).convert("L").save(place / "grey.png")
    one, two, clear, grey = (str(place / name) for name in ("0.png", "1.png", "clear.png", "grey.png"))
    return [
        (one, QUESTION, {"maxNewTokens": 6}),
        (clear, QUESTION, {"maxNewTokens": 3}),
        (grey, QUESTION, {"maxNewTokens": 3}),
        ([one, two], "how many objects are there?", {"maxNewTokens": 4}),
        (None, "how many?", {"maxNewTokens": 3}),
        (two, "and  what\tis that? ", {"maxNewTokens": 6, "temperature": 5, "seed": 7}),
        (two, QUESTION, {"maxNewTokens": 6, "temperature": 2.5, "topP": 0.8, "topK": 9, "seed": 123456789}),
        (None, "where?", {"maxNewTokens": 4, "history": [{"picture": one, "question": QUESTION, "answer": "red"}]}),
    ]


@needs_packages
@pytest.mark.parametrize("runtime", ["node", "web"])
def test_answers_are_the_python_runners(folder: Path, tmp_path: Path, runtime: str) -> None:
    check_same(folder, questions(tmp_path), runtime)


@needs_packages
def test_errors_say_what_where_and_what_to_do(folder: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    seen = str(tmp_path / "0.png")
    wrong: list[tuple[Any, str, dict[str, Any], str]] = [
        (seen, "what <image>?", {}, "is a token of the model"),
        (str(tmp_path / "none.png"), QUESTION, {}, "the picture cannot be read"),
        (seen, QUESTION, {"maxNewTokens": 0}, "maxNewTokens is 0"),
        (seen, QUESTION, {"temperature": -1}, "temperature is -1"),
        (seen, QUESTION, {"seed": 1.5}, "seed is 1.5"),
    ]
    found = node("ask.mjs", folder, "node", given=[each[:3] for each in wrong])
    for line, (*_, message) in zip(found, wrong, strict=True):
        assert message in line["what"] and line["where"] and line["advice"]


@needs_packages
def test_a_project_of_commonjs_around_the_folder(folder: Path, tmp_path: Path) -> None:
    """What `npm init` writes above the folder does not decide how its files are read, and npm may write into it."""
    (tmp_path / "package.json").write_text('{ "type": "commonjs" }')
    shutil.copytree(folder, tmp_path / "out")
    assert node("ask.mjs", tmp_path / "out", "node", given=[]) == []
    (tmp_path / "out" / "package.json").write_text('{ "type": "module", "dependencies": {} }')
    assert node("ask.mjs", tmp_path / "out", "node", given=[]) == []
    Runner(tmp_path / "out", threads=1)


@needs_packages
@pytest.mark.parametrize("name", ["decode.onnx", "weights.data", "chat.json"])
@pytest.mark.parametrize("runtime", ["node", "web"])
def test_an_altered_file_is_named(folder: Path, tmp_path: Path, name: str, runtime: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    (line,) = node("ask.mjs", copy, runtime, given=[])
    assert "its hash differs" in line["what"] and line["where"].endswith(name)


SETTINGS: dict[str, dict[str, Any]] = {
    "fixed": {"size": [24], "crop": [24, 24], "pad": None, "tokens": 4},
    "padded": {"size": [30, 20], "crop": None, "pad": [120, 3, 250], "tokens": 4, "resample": 2},
    "larger crop": {"size": None, "crop": [90, 101], "pad": None, "tokens": 4, "rescale": None},
    "as it is": {"size": [40, 40], "crop": None, "pad": None, "tokens": 9, "mean": None, "std": None, "resample": 0},
    "lanczos": {"size": [33, 47], "crop": None, "pad": None, "tokens": 9, "resample": 1},
    "patches": {"kind": "patches", "size": [784, 12544], "patch": 4, "merge": 2, "frames": 2},
    "many pixels": {"kind": "patches", "size": [20000, 90000], "patch": 7, "merge": 1, "frames": 1, "resample": 5},
}
SHARED = {
    "kind": "fixed",
    "resample": 3,
    "rescale": 1 / 255,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
SHAPES = ((1, 1), (37, 53), (64, 64), (100, 31), (5, 90))


@needs_node
@pytest.mark.parametrize("name", SETTINGS)
def test_pixels_are_the_python_runners(name: str) -> None:
    settings = SHARED | SETTINGS[name]
    reader = Pictures.read(settings, "here")
    pictures = [picture(number, *shape) for number, shape in enumerate(SHAPES)]
    found = node("pixels.mjs", SOURCE / "pictures.js", given=[
        {"settings": settings, "width": each.width, "height": each.height,
         "data": base64.b64encode(each.tobytes()).decode()} for each in pictures
    ])  # fmt: skip
    for each, line in zip(pictures, found, strict=True):
        arrays, (tokens,) = reader.inputs([each])
        values = np.frombuffer(base64.b64decode(line["values"]), np.float32)
        wanted = arrays["pixel_values"]
        assert np.array_equal(values.reshape(wanted.shape), wanted), each.size
        assert line["tokens"] == tokens
        if line["grid"] is not None:
            assert arrays["image_grid_thw"].tolist() == [[1, *line["grid"]]]


@needs_node
def test_the_area_of_a_cropped_picture() -> None:
    """80 x 40 pixels become 48 x 24, of which the middle 24 x 24 are seen: pixels 20 to 60."""
    seen = Image.new("RGB", (80, 40))
    settings = SHARED | SETTINGS["fixed"]
    given = {"settings": settings, "width": 80, "height": 40, "data": base64.b64encode(seen.tobytes()).decode()}
    (line,) = node("pixels.mjs", SOURCE / "pictures.js", given=[given])
    assert line["area"] == {"x": 20, "y": 0, "width": 40, "height": 40}


def test_the_module_is_one_file_of_all_parts() -> None:
    text = js_text()
    assert {path.stem for path in SOURCE.iterdir()} == set(PARTS)
    assert not re.search(r"^import ", text, re.MULTILINE)
    assert re.findall(r"^export .*", text, re.MULTILINE) == [f"export {{ {', '.join(EXPORTED)} }};"]
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", text, re.MULTILINE)
    assert len(names) > 40 and max(Counter(names).values()) == 1
    assert text.startswith("// Ask an exported folder about pictures")


def test_the_folder_has_module_and_page(folder: Path) -> None:
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"qpcompile.js", "index.html", "worker.js"} <= set(listed)
    assert (folder / "qpcompile.js").read_text() == js_text()
    readme = (folder / "README.md").read_text()
    vendored = set(re.findall(r'"([\w.-]+\.min\.mjs)"', (folder / "worker.js").read_text()))
    assert len(vendored) == 2 and all(f"/{name} vendor/" in readme for name in vendored)


def test_a_folder_without_questions_has_neither(plain: Path) -> None:
    assert not (plain / "qpcompile.js").exists() and not (plain / "index.html").exists()


@pytest.mark.slow
@needs_packages
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("fast", [False, True])
def test_testbeds_answer_as_the_python_runner(name: str, fast: bool, tmp_path: Path) -> None:
    data = TESTBED.parent / "calibration" / name
    cut = ["tokens.method=fastv", "tokens.keep=0.3", "tokens.candidate_layers=[2]"]
    recipe = Recipe.load("none").with_overrides(cut)
    qpcompile.compile(TESTBED.parent / name, recipe, calibration=data).export_onnx(tmp_path / "out", fast=fast)
    asked = [(str(each.image), each.question, {"maxNewTokens": 8}) for each in read_data(data)[:20]]
    for runtime in ("node", "web"):
        check_same(tmp_path / "out", [*asked, *questions(tmp_path)], runtime)
