"""Tensors and types of a folder with recomputed hashes: what no operator accepts is refused when it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import captured, changed_recipe, fresh
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpcompile.compiled import CompiledVLM, load
from qpcompile.emit.artifact.manifest import write_manifest
from qpcompile.errors import ArtifactError
from qpcompile.ir.code_bits import BITS
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.types import type_of
from qpcompile.pass_list import passes

WEIGHTS = "model-00001-of-00001.safetensors"
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with 4-bit weights, activations and cache, and an 8-bit head; do not change it."""
    _, cases, _ = captured()
    settings = ("quantize.weights.solver=rtn", "quantize.activations.clip_search=false")
    program = fresh(changed_recipe("w4a4kv4", *settings))
    run_passes(program, passes([cases["one"], cases["longer"]], 2))
    folder = tmp_path_factory.mktemp("operands") / "out"
    CompiledVLM(program).save_pretrained(folder)
    return folder


def hash_again(folder: Path) -> None:
    facts = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    write_manifest(
        folder, {key: facts[key] for key in facts if key not in ("format", "format_version", "files", "digest")}
    )


def bend(folder: Path, suffix: str, change: Change, *, tell: bool) -> str:
    """Change the first tensor with this ending, and where `tell` the type that graphs give for it; returns its name."""
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in sorted(tensors) if key.endswith(suffix))
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if tell:
        kind = str(type_of(tensors[name]))
        for path in (folder / "graph").glob("*.json"):
            data = json.loads(path.read_text())
            for node in data["nodes"]:
                if node.get("key") == name:
                    node["type"] = kind
            path.write_text(json.dumps(data))
    hash_again(folder)
    return name


# The ending of a tensor's name, how it changes, and what is named where the graphs' types are changed with it.
BENT: dict[str, tuple[str, Change, str]] = {
    "scales of one element": ("v_proj.weight_scale", lambda each: each[:1], "linear_int, operand weight_scale"),
    "no scales": ("v_proj.weight_scale", lambda each: each[:0], "linear_int, operand weight_scale"),
    "scales of bf16": ("up_proj.weight_scale", lambda each: each.bfloat16(), "linear_int, operand weight_scale"),
    "scales without groups": ("up_proj.weight_scale", lambda each: each[:, :0], "linear_int, operand weight_scale"),
    "codes half as wide": ("v_proj.weight_packed", lambda each: each[:, :12], "linear_int, operand weight"),
    "codes of i8": ("v_proj.weight_packed", lambda each: each.view(torch.int8), "linear_int, operand weight"),
    "a row of codes too few": ("up_proj.weight_packed", lambda each: each[1:], "linear_int, operand weight_scale"),
    "a bias of one": ("fc1.bias", lambda each: each[:1], "linear_int, operand bias"),
    "head scales of one": ("lm_head.weight_scale", lambda each: each[:1], "linear_w8a16, operand weight_scale"),
    "head scales of f64": ("lm_head.weight_scale", lambda each: each.double(), "linear_w8a16, operand weight_scale"),
    "a norm of one": ("0.input_layernorm.weight", lambda each: each[:1], "graph/"),
    "a layer norm of one": ("pre_layrnorm.weight", lambda each: each[:1], "graph/vision.json"),
}


@pytest.mark.parametrize(("suffix", "change", "named"), BENT.values(), ids=list(BENT))
def test_bent_tensor_is_refused_by_name(saved: Path, tmp_path: Path, suffix: str, change: Change, named: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    bend(folder, suffix, change, tell=True)
    with pytest.raises(ArtifactError) as error:
        load(folder)
    where = str(error.value.where)
    assert where.startswith("graph/") and ".json, " in where and named in where and error.value.do


@pytest.mark.parametrize("kind", ["scales of one element", "codes half as wide", "a norm of one"])
def test_type_that_is_not_the_tensors_is_refused(saved: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    suffix, change, _ = BENT[kind]
    bend(folder, suffix, change, tell=False)
    with pytest.raises(ArtifactError, match=rf"the weight \S*{suffix} is .*, the graph says") as error:
        load(folder)
    assert str(error.value.where).startswith("graph/")


def test_bent_tensor_of_the_host_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    name = bend(folder, "embed_tokens.weight", lambda each: each[:, :24], tell=False)
    with pytest.raises(ArtifactError, match=r"is f32\[99, 24\]; by config.json the host has f32\[99, 48\]") as error:
        load(folder)
    assert name in error.value.what


def test_wrong_type_of_a_value_is_refused(saved: Path, tmp_path: Path) -> None:
    """The C kernels take the width of rows from the recorded type."""
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    path = folder / "graph/decode.json"
    data = json.loads(path.read_text())
    node = next(node for node in data["nodes"] if node["type"] == "f32[B, 1, 48]" and node["op"] == "call")
    node["type"] = "f32[B, 1, 96]"
    path.write_text(json.dumps(data))
    hash_again(folder)
    with pytest.raises(ArtifactError, match="it is recorded as") as error:
        load(folder)
    assert f"graph/decode.json, {node['label']}" in str(error.value.where)


def test_saved_again_it_loads(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path / "again")
    load(tmp_path / "again")


def test_operators_of_another_version_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "out")
    path = folder / "graph" / "decode.json"
    path.write_text(path.read_text().replace("qpcompile::attention_step.", "qpcompile::attention_step4."))
    hash_again(folder)
    with pytest.raises(ArtifactError, match=r"operator 'qpcompile::attention_step4\.default' is not") as error:
        load(folder)
    assert "compile the model again" in str(error.value) and "graph/decode.json" in str(error.value.where)


def test_bits_that_no_quantizer_makes_are_refused(saved: Path, tmp_path: Path) -> None:
    """The CPU reads codes of any bits; a GPU would pack 8-bit codes as 4-bit ones."""
    folder = shutil.copytree(saved, tmp_path / "out")
    path = folder / "graph" / "prefill.json"
    data = json.loads(path.read_text())
    product = next(node for node in data["nodes"] if node.get("target", "").startswith("qpcompile::linear_int"))
    assert product["args"][BITS] == 4
    product["args"][BITS] = 8
    path.write_text(json.dumps(data))
    hash_again(folder)
    with pytest.raises(ArtifactError, match=r"takes codes of 8 bits, .* makes them of 4"):
        load(folder)


def test_several_values_returned_as_one_are_refused(saved: Path, tmp_path: Path) -> None:
    """Code that binds a graph takes the parts of such a value by their numbers."""
    folder = shutil.copytree(saved, tmp_path / "out")
    path = folder / "graph" / "decode.json"
    data = json.loads(path.read_text())
    pair = next(node["label"] for node in data["nodes"] if node.get("type", "").startswith("("))
    data["nodes"][-1]["args"]["tuple"][0] = {"ref": pair}
    path.write_text(json.dumps(data))
    hash_again(folder)
    with pytest.raises(ArtifactError, match="several values are returned as one"):
        load(folder)
