"""Hostile folders for onnxruntime-genai: what the package would read from them is found before it is called."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import genai_stand_in
import onnx
import pytest

from qpcompile.capture.capture import capture
from qpcompile.emit.onnx.export import export_onnx
from qpcompile.emit.onnx.runner import genai
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.emit.onnx.runner.genai import CONFIG, GenaiRunner
from qpcompile.recipe.recipe import Recipe
from tests.artifacts import edit, rehash
from tests.families import llava

STOP = 98
OPTIONS = '"session_options": {'


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a random model; do not change it."""
    model, cases = llava(head_dim=16)
    model.generation_config.eos_token_id = STOP  # type: ignore[union-attr]
    folder = tmp_path_factory.mktemp("genai") / "out"
    export_onnx(capture(model, cases["one"], Recipe.load("none")), folder, target="genai")
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(RunnerError, match=message) as error:
        list(GenaiRunner(folder).tokens([[1, 2, 3]], 2))
    assert error.value.where and error.value.do


@pytest.mark.parametrize(
    "change",
    [
        lambda all: all["model"]["decoder"]["session_options"].update(custom_ops_library="evil.so"),
        lambda all: all["model"].update(draft={"filename": "other.onnx"}),
        lambda all: all["model"]["decoder"]["pipeline"][0]["prefill"].update(session_options={}),
        lambda all: all["model"]["decoder"]["pipeline"][0]["prefill"].update(filename="../other.onnx"),
        lambda all: all["model"]["decoder"].update(pipeline=[]),
        lambda all: all["model"].pop("decoder"),
        lambda all: all["model"].update(type="whisper"),
        lambda all: all["search"].update(past_present_share_buffer=True),
        lambda all: all["model"]["decoder"]["pipeline"][0]["vision"].update(inputs=[7]),
        lambda all: all["model"]["decoder"]["pipeline"][0]["vision"].pop("outputs"),
        lambda all: all["model"]["decoder"].update(session_options={}),
    ],
    ids=[
        *("library", "other model", "options of a stage", "file outside", "no stages", "no decoder"),
        *("kind of model", "shared cache", "inputs that are numbers", "no outputs", "no options"),
    ],
)
def test_a_configuration_that_no_export_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    rehash(folder)
    monkeypatch.setattr(genai, "package", lambda: None)
    refused(folder, "is not one that an export writes")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (lambda text: text.replace(OPTIONS, f'{OPTIONS}"custom_ops_library": "x.so"}}, {OPTIONS}'), "twice"),
        (lambda text: text.replace("2,", "2 ,", 1) + " ", "is not one that an export writes"),
        (lambda text: text.replace("{", '{"a":' + "[" * 500 + "]" * 500 + ",", 1), "deep"),
        (lambda text: re.sub(r'(num_hidden_layers": )\d+', r"\g<1>2000000000", text), "num_hidden_layers"),
        (lambda text: text.replace('"num_beams": 1', '"num_beams": 1000000000'), "num_beams"),
        (lambda text: re.sub(r'"pad_token_id": \d+', '"pad_token_id": 2000000000', text), "pad_token_id"),
        (lambda text: text.replace(f"{STOP}\n", "2000000000\n"), "eos_token_id"),
    ],
    ids=["key twice", "other spaces", "deep", "layers", "beams", "padding", "stop token"],
)
def test_a_configuration_that_the_package_would_read_in_another_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[[str], str], message: str
) -> None:
    """genai reads the file itself: it sees both values of a key, and writes to memory by numbers in it."""
    path = folder / CONFIG
    path.write_text(written(before := path.read_text()))
    assert path.read_text() != before
    rehash(folder)
    monkeypatch.setattr(genai, "package", lambda: None)
    refused(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(vision_config=None), "does not run this prompt"),
        (lambda config: config.update(vision_config=[1]), "does not run this prompt"),
        (lambda config: config["vision_config"].update(spatial_merge_size=0), "spatial_merge_size is 0"),
        (lambda config: config["vision_config"].update(num_channels=4096, image_size=4096), "pictures of the shape"),
    ],
    ids=["no tower", "tower that is a list", "merges nothing", "274 GB of pixels"],
)
def test_a_tower_that_no_export_describes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], message: str
) -> None:
    monkeypatch.setattr(genai, "package", lambda: genai_stand_in)
    edit(folder, "config.json", change)
    rehash(folder)
    refused(folder, message)


def test_a_graph_that_no_export_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "genai_logits.onnx"
    model = onnx.load(path)
    model.graph.node[0].op_type = "RandomNormalLike"
    onnx.save(model, path)
    rehash(folder)
    monkeypatch.setattr(genai, "package", lambda: None)
    refused(folder, "RandomNormalLike")
