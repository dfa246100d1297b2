"""A model with bits per site and centred keys: fused, decoded as recomputed, saved, loaded, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import qpcompile
from qpcompile.emit.artifact.model_card import model_card
from qpcompile.ir.edit import calls
from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.operators import ATTENTION_STEP, LINEAR_INT, ROPE_KV_WRITE
from qpcompile.ir.program import DECODE, PREFILL
from qpcompile.ir.shapes import value
from qpcompile.recipe.bits_told import told_bits
from qpcompile.recipe.recipe import Recipe

MIXED = (
    *(
        "quantize.mean_bits={weights: 5, activations: 6}",
        "quantize.kv_cache.center=true",
        "quantize.transform=hadamard",
    ),
    *("quantize.weights.solver=rtn", "numerics=exact", "quality.samples=0"),
)


def test_all_back_ends_agree(tiny_llava: tuple[Any, dict[str, dict[str, torch.Tensor]]], tmp_path: Path) -> None:
    """The compile itself compares decoding with recomputation."""
    model, cases = tiny_llava
    sample = cases["one"]
    compiled = qpcompile.compile(model, Recipe.load("w4a4kv4").with_overrides(MIXED), calibration=[sample])
    program = compiled.program
    linears = list(calls(program.graphs[PREFILL], LINEAR_INT))
    assert sorted({int(node.args[6]) for node in linears}) == [4, 8]  # type: ignore[arg-type]
    assert {value(node.args[2]).dtype for node in linears} == {torch.uint8, torch.int8}  # type: ignore[arg-type]
    for name, operator in ((PREFILL, ROPE_KV_WRITE), (DECODE, ATTENTION_STEP)):
        nodes = list(calls(program.graphs[name], operator))
        assert len(nodes) == 3 and all(any("center" in str(arg) for arg in node.args) for node in nodes)
    assert not [miss for miss in program.measured[NEAR_MISSES] if "other bits" in miss.reason]
    told = told_bits(program.plan)
    assert [line.partition(" ")[0] for line in told] == ["activations:", "weights:", "keys"]
    assert all(line in model_card(program, 1) for line in told)

    expected = compiled.generate(**sample, max_new_tokens=6, do_sample=False)
    compiled.save_pretrained(tmp_path / "saved")
    loaded = qpcompile.load(tmp_path / "saved")
    assert loaded.plan == program.plan
    assert torch.equal(loaded.generate(**sample, max_new_tokens=6, do_sample=False), expected)
    compiled.export_onnx(tmp_path / "onnx", check=[sample])
    found = json.loads((tmp_path / "onnx" / "check.json").read_text())
    assert found["answers"] == found["alike"] == 1, found
