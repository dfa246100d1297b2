"""Mixtures of experts, compiled: every expert is packed, and a saved model answers as before it was saved."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from models import Cases, build
from one import answer, compiled_by

import qpcompile
from qpcompile.capture.capture import capture
from qpcompile.emit.compressed.tensors import read_tensors
from qpcompile.errors import ExportError
from qpcompile.evaluate.run.footprint import decoder_linear_bytes
from qpcompile.ir.edit import calls
from qpcompile.ir.operators import EXPERT_LINEAR, EXPERT_LINEAR_A16, EXPERT_LINEAR_INT
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.ir.shapes import value
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.host import empty_host

FAMILY = "qwen3_vl_moe"
slow = pytest.mark.slow
FAMILIES = [
    *("aria", "ernie4_5_vl_moe", "glm4v_moe", "kimi_k25", "llama4", "minimax_m3_vl", "qwen3_5_moe"),
    *("qwen3_omni_moe_thinker", "step3p7"),
]


@functools.cache
def captured(family: str) -> tuple[torch.nn.Module, Cases, Program]:
    model, cases = build(family)
    return model, cases, capture(model, copy.deepcopy(cases["one"]), Recipe.load("none"))


@pytest.mark.parametrize(
    ("family", "preset", "changes"),
    [
        (FAMILY, "w4a8kv4", []),
        pytest.param(FAMILY, "w4a16", [], marks=slow),
        pytest.param(FAMILY, "w8a8", [], marks=slow),
        pytest.param(FAMILY, "w4a4kv4", ["quantize.training.epochs=1", "quantize.mean_bits.weights=5"], marks=slow),
        *(pytest.param(family, "w4a8kv4", [], marks=slow) for family in FAMILIES),
    ],
)
def test_every_expert_is_packed(tmp_path: Path, family: str, preset: str, changes: list[str]) -> None:
    _, cases, program = captured(family)
    full = decoder_linear_bytes(program)
    compiled = compiled_by(program, preset, changes, [cases["one"], cases["longer"]])
    assert not [item for item in compiled.program.plan.left_out if "expert" in item.name]
    stored = torch.int8 if preset == "w8a8" else torch.uint8
    for name in (PREFILL, DECODE):
        graph, before = compiled.program.graphs[name], program.graphs[name]
        products = list(calls(graph, EXPERT_LINEAR_INT, EXPERT_LINEAR_A16))
        assert len(products) == len(list(calls(before, EXPERT_LINEAR))) > 0
        assert not list(calls(graph, EXPERT_LINEAR))
        types = {value(product.args[1 if product.target is EXPERT_LINEAR_A16 else 2]).dtype for product in products}  # type: ignore[arg-type]
        assert stored in types and types <= {torch.uint8, torch.int8}
    # An eighth of float32, and scales, which weigh much in layers of 64 channels.
    assert decoder_linear_bytes(compiled.program) < full * (0.3 if stored == torch.uint8 else 0.4)
    host = compiled.program.host
    with pytest.raises(ExportError, match=r"is a weight of experts(.|\n)*experts\[.\]"):
        read_tensors(compiled.program, empty_host(type(host), host.config))  # type: ignore[arg-type]
    compiled.save_pretrained(tmp_path / "out")
    loaded = qpcompile.load(tmp_path / "out")
    for inputs in cases.values():
        (tokens, logits), (others, rows) = answer(compiled, inputs), answer(loaded, inputs)
        assert torch.equal(tokens, others) and (logits - rows).abs().max() < 1e-4
