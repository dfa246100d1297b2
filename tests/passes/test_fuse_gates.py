"""Activation functions and gated products that nothing quantizes become one operator."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from programs import program_of, relative, run, traced
from torch import Tensor, nn

from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.program import Program
from qpcompile.ir.text import graph_text
from qpcompile.passes.fuse_kernels import FuseKernels

Apply = Callable[[Program, FuseKernels], bool]
TOKENS = {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))}
# Functions rounded with their product, not before it.
LAST_BIT = 1e-6


class Gates(nn.Module):
    """Activations and gates that nothing quantizes; `kind` names one that is not the pattern."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        gate, up = nn.functional.silu(x), x + 1
        quick = up * torch.sigmoid(1.702 * up)
        if self.kind == "another slope":
            return up * torch.sigmoid(1.7 * up)
        if self.kind == "function read twice":
            return gate * up + gate
        if self.kind == "a row for all":
            return gate * up[:, :1]
        return gate * up + quick * (x - 1) + nn.functional.gelu(up, approximate="tanh") * x + torch.sin(up) * quick


def test_gates_without_a_quantizer_are_one_operator(apply: Apply) -> None:
    graph = traced(Gates(), TOKENS)
    program = program_of(graph, stage="quantized")
    expected = run(graph, **TOKENS)["y"]
    assert apply(program, FuseKernels())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 8]
# top
%1 = aten::add.Tensor(%0, 1) : f32[B, S0, 8]
%2 = qpcompile::activation(%1, None, 'gelu_sigmoid') : f32[B, S0, 8]
%3 = qpcompile::activation(%0, %1, 'silu') : f32[B, S0, 8]
%4 = aten::sub.Tensor(%0, 1) : f32[B, S0, 8]
%5 = aten::mul.Tensor(%2, %4) : f32[B, S0, 8]
%6 = aten::add.Tensor(%3, %5) : f32[B, S0, 8]
%7 = qpcompile::activation(%1, %0, 'gelu_tanh') : f32[B, S0, 8]
%8 = aten::add.Tensor(%6, %7) : f32[B, S0, 8]
%9 = aten::sin(%1) : f32[B, S0, 8]
%10 = aten::mul.Tensor(%9, %2) : f32[B, S0, 8]
%11 = aten::add.Tensor(%8, %10) : f32[B, S0, 8]
return y = %11
""",
    )
    assert relative(run(graph, **TOKENS)["y"], expected) < LAST_BIT


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("another slope", ""),
        ("function read twice", "has another reader"),
        ("a row for all", "multiplies by something other than a tensor of the same type and sizes"),
    ],
)
def test_other_gates_stay(apply: Apply, kind: str, reason: str) -> None:
    graph = traced(Gates(kind), TOKENS)
    program, before = program_of(graph, stage="quantized"), graph_text(graph)
    assert not apply(program, FuseKernels()) and graph_text(graph) == before
    assert [miss.reason.endswith(reason) for miss in program.measured[NEAR_MISSES]] == [True] * bool(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gates_stay_in_half_precision(apply: Apply, dtype: torch.dtype) -> None:
    feeds = {"x": TOKENS["x"].to(dtype)}
    graph = traced(Gates(), feeds)
    expected = run(graph, **feeds)["y"]
    assert apply(program_of(graph, stage="quantized"), FuseKernels())
    found = run(graph, **feeds)["y"]
    assert found.dtype == dtype and relative(found, expected) < torch.finfo(dtype).eps
