"""A hostile exported folder: what is altered, or no export would write, is refused with the name of its file."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpcompile.emit.onnx.runner.folder import MANIFEST, WEIGHTS, RunnerError, check_folder, digest
from qpcompile.emit.onnx.runner.runner import OnnxVLM
from qpcompile.emit.onnx.runner_file import PARTS, runner_text
from qpcompile.files import sha256

Damage = Callable[[Path], Any]


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged; beside it is a file that could be read by mistake."""
    copy = tmp_path / "folder"
    shutil.copytree(plain, copy)
    shutil.copy(plain / WEIGHTS, tmp_path / "outside.data")
    return copy


def resealed(folder: Path) -> None:
    """Sizes and hashes as an attacker writes them: those of the current files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in [name for name in manifest["files"] if (folder / name).is_file()]:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(manifest)}))


def refused(folder: Path, name: str, message: str = "") -> None:
    with pytest.raises(RunnerError, match=message) as error:
        OnnxVLM(folder, threads=1)
    assert name in error.value.where and error.value.do


def in_model(change: Callable[[onnx.ModelProto], Any], name: str = "decode.onnx") -> Damage:
    """Change a graph as protobuf."""

    def damage(folder: Path) -> None:
        model = onnx.load(folder / name, load_external_data=False)
        change(model)
        (folder / name).write_bytes(model.SerializeToString())

    return damage


def placed(**entries: str | None) -> Damage:
    """Change the location entries of the first large tensor; None removes one."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        kept = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in kept.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return in_model(change)


def second_place(model: onnx.ModelProto) -> None:
    next(tensor for tensor in model.graph.initializer if tensor.external_data).external_data.add(
        key="location", value="../outside.data"
    )


def operator(name: str, domain: str = "") -> Damage:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[3].op_type, model.graph.node[3].domain = name, domain

    return in_model(change)


def nested(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "g", [], [])
    for _ in range(12):
        inner = onnx.helper.make_graph([onnx.helper.make_node("Loop", [], ["y"], body=inner)], "g", [], [])
    model.graph.node.append(inner.node[0])


def hidden_operator(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_graph([onnx.helper.make_node("Evil", ["x"], ["y"], domain="own")], "g", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", [], ["z"], body=inner))


def hidden_tensor(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../outside.data")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["z"], value=tensor))


def sized(*dims: int) -> Damage:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return in_model(change)


def typed(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = onnx.TensorProto.STRING


def inside(*dims: int, raw: bytes = b"", typed: tuple[int, ...] = ()) -> Damage:
    """A tensor of 64-bit integers that lies in the graph's own file."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.add(name="t", data_type=7, dims=dims, raw_data=raw, int64_data=typed)

    return in_model(change)


def function(model: onnx.ModelProto) -> None:
    model.functions.add(name="Abs", domain="own")


def training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def cut_off(folder: Path) -> None:
    data = (folder / "decode.onnx").read_bytes()
    (folder / "decode.onnx").write_bytes(data[: len(data) // 2])


def twice(folder: Path) -> None:
    with (folder / "decode.onnx").open("ab") as file:
        file.write((folder / "decode.onnx").read_bytes())


def shortened(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 1000)


HOSTILE: dict[str, tuple[Damage, str]] = {
    "folder above": (placed(location="../outside.data"), "lies in '../outside.data'"),
    "absolute path": (placed(location="/etc/passwd"), "lies in '/etc/passwd'"),
    "another file": (placed(location="config.json"), "lies in 'config.json'"),
    "memory": (placed(location="*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_"),
    "two places": (in_model(second_place), "twice"),
    "beyond the end": (placed(offset="999999999"), "of weights"),
    "before the beginning": (placed(offset="-5"), "no place"),
    "too short": (placed(length="8"), "takes 8 at"),
    "without a length": (placed(length=None), "the weights are in"),
    "weights cut off": (shortened, "of 1000 bytes of weights"),
    "unknown operator": (operator("PyOp"), "PyOp"),
    "operator of another domain": (operator("Add", "own.library"), "own.library"),
    "operator that reads a file": (operator("EPContext", "com.microsoft"), "EPContext"),
    "operator inside an operator": (in_model(hidden_operator), "Evil"),
    "tensor inside an operator": (in_model(hidden_tensor), "outside"),
    "graphs in graphs": (in_model(nested), "deep"),
    "huge tensor": (sized(2**40), "sizes"),
    "negative size": (sized(-1), "sizes"),
    "many axes": (sized(*[1] * 100), "sizes"),
    "product that wraps around": (sized(2**32, 2**32), "sizes"),
    "texts": (in_model(typed), "type"),
    "more numbers than bytes": (inside(2**20, raw=bytes(8)), "of 8388608 bytes has 8"),
    "more bytes than numbers": (inside(1, raw=bytes(16)), "of 8 bytes has 16"),
    "no bytes": (inside(2), "of 16 bytes has 0"),
    "numbers of their own": (inside(2, typed=(1, 2)), "not raw bytes"),
    "functions": (in_model(function), "the function 'own.Abs'"),
    "training": (in_model(training), "training"),
    "sparse": (in_model(sparse), "sparse"),
    "cut off": (cut_off, "cut off|operator|type"),
    "two graphs": (twice, "2 graphs|two functions"),
    "no protobuf": (lambda folder: (folder / "decode.onnx").write_bytes(b"\xff" * 99), "not protobuf"),
    "empty": (lambda folder: (folder / "decode.onnx").write_bytes(b""), "0 graphs"),
}


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_graphs_are_refused_before_onnxruntime(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, message: str
) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("onnxruntime saw it"))
    damage(folder)
    if damage is not shortened:
        refused(folder, "decode.onnx", "not the one that was exported")
    resealed(folder)
    refused(folder, "decode.onnx", message)


@pytest.mark.parametrize(
    "name", ["vision.onnx", "prefill.onnx", WEIGHTS, "config.json", "plan.yaml", "runner.py", MANIFEST]
)
def test_an_altered_file_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))
    refused(folder, name, "its hash differs" if name != MANIFEST else "")
    (folder / name).unlink()
    refused(folder, name, "missing")


def test_links_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../outside.data")
    refused(folder, WEIGHTS, "a link")


def in_json(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))
        if name == MANIFEST:
            refused(folder, MANIFEST)
            write_manifest(folder, content)

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


SETTINGS = "generation_config.json"
TEXTS: dict[str, tuple[Damage, str, str]] = {
    "no JSON": (text(MANIFEST, "{"), MANIFEST, "cannot be read"),
    "deep JSON": (text(MANIFEST, "[" * 10**5), MANIFEST, "cannot be read"),
    "objects in objects": (text(MANIFEST, '{"a":' * 99 + "{}" + "}" * 99), MANIFEST, "nested more than"),
    "key twice": (text(MANIFEST, '{"format": "x", "format": "y"}'), MANIFEST, "occurs twice"),
    "long number": (text(MANIFEST, '{"a": ' + "9" * 5000 + "}"), MANIFEST, "cannot be read"),
    "no object": (text(MANIFEST, "[]"), MANIFEST, "holds no object"),
    "large": (text(MANIFEST, " " * 2**23), MANIFEST, "at most"),
    "another format": (in_json(MANIFEST, format="x"), MANIFEST, "not an exported folder"),
    "no files": (in_json(MANIFEST, files=[]), MANIFEST, "not a list of files"),
    "outside": (in_json(MANIFEST, files={"../outside.data": {}}), MANIFEST, "not a file of this"),
    "no sizes": (
        in_json(MANIFEST, files={"config.json": {"bytes": True, "sha256": ""}}),
        MANIFEST,
        "not a file of this",
    ),
    "nothing listed": (in_json(MANIFEST, files={}), "folder", "does not list vision.onnx"),
    "token that is text": (in_json("config.json", image_token_id="x"), "config.json", "image_token_id is 'x'"),
    "token out of range": (in_json("config.json", image_token_id=10**12), "config.json", "image_token_id is 1000"),
}


@pytest.mark.parametrize(("damage", "name", "message"), TEXTS.values(), ids=list(TEXTS))
def test_hostile_texts_are_refused(folder: Path, damage: Damage, name: str, message: str) -> None:
    damage(folder)
    if name == "config.json":
        resealed(folder)
    refused(folder, name, message)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    refused(tmp_path, MANIFEST, "missing")


def test_a_graph_that_is_none_of_the_runners(folder: Path) -> None:
    """Valid graphs in the wrong places: any error of onnxruntime or numpy becomes the runner's error."""
    shutil.copy(folder / "vision.onnx", folder / "decode.onnx")
    resealed(folder)
    with pytest.raises(RunnerError, match="do not do what the runner expects"):
        OnnxVLM(folder, threads=1).generate([[1, 5, 6]], max_new_tokens=3)


def test_what_was_exported_passes(plain: Path) -> None:
    config, settings, files = check_folder(plain)
    assert "README.md" in files and "chat.json" not in files
    assert config["image_token_id"] == 90 and settings["pad_token_id"] == 0


def test_command_line_prints_what_where_and_do(folder: Path) -> None:
    def ask(*words: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, folder / "runner.py", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = ask(folder, folder / "config.json")
    assert done.returncode == 1 and done.stderr.startswith("error: this is not an .npz file") and not done.stdout
    assert "where: " in done.stderr and "what to do: " in done.stderr and "Traceback" not in done.stderr
    assert ask(folder, "x.npz", "--max-new-tokens", "0").returncode == 2
    np.savez(folder.parent / "in.npz", input_ids=np.ones((1, 3), int), seed=1)
    done = ask(folder, folder.parent / "in.npz")
    assert done.returncode == 1 and "holds seed, which" in done.stderr and "Traceback" not in done.stderr


def test_runner_is_one_file_of_all_parts() -> None:
    tree = ast.parse(runner_text())
    given: dict[str, set[str]] = {}
    for node in tree.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        for name in names:
            given.setdefault(name, set()).add(ast.unparse(node))
    twice = [name for name, meanings in given.items() if len(meanings) > 1]
    assert not twice, "two parts give one name to two things"
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert outside == {"numpy", "onnxruntime", "PIL", "tokenizers"}
    assert {part.__name__.rpartition(".")[0] for part in PARTS} == {"qpcompile.emit.onnx.runner", "qpcompile"}
