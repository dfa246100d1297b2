"""Reductions before int4 quantizers are computed in float64 and rounded once; everything else is unchanged."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from programs import program_of, relative, run, traced
from torch import Tensor, nn

from qpcompile.errors import InvariantError
from qpcompile.ir.edit import aten, calls
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import HEAD, Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.passes.widen_sums import WidenSums

Apply = Callable[[Program, WidenSums], bool]
WIDTH = 6
TOKENS = {"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))}


class Normed(nn.Module):
    """A norm and a gate, quantized unless `plain`."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = y * torch.sigmoid(y)
        return y if self.plain else torch.ops.qpcompile.quantize_int4(y, 0, 1.0)[0]


class Patches(nn.Module):
    """A convolution and the quantizer after it; a stride of its kernel size gives patches that do not overlap."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, WIDTH, 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qpcompile.quantize_int4(self.embed(x), 0, 1.0)[1]


def wide(graph: Graph) -> int:
    """How many operators compute in float64."""
    made = [node for node in graph.nodes if node.op == "call_function" and node.target is not aten.to.dtype]
    return sum(isinstance(node.meta["val"], Tensor) and node.meta["val"].dtype == torch.float64 for node in made)


def fused(graph: Graph) -> Program:
    return program_of(graph, stage="fused")


def test_golden(apply: Apply) -> None:
    graph = traced(Normed(), TOKENS)
    assert apply(fused(graph), WidenSums())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 6]
# norm
%1 = aten::to.dtype(%0, f64) : f64[B, S0, 6]
@norm.weight : f32[6]
%2 = aten::to.dtype(@norm.weight, f64) : f64[6]
@norm.bias : f32[6]
%3 = aten::to.dtype(@norm.bias, f64) : f64[6]
%4 = aten::layer_norm(%1, [6], %2, %3, 1e-05, False) : f64[B, S0, 6]
%5 = aten::to.dtype(%4, f32) : f32[B, S0, 6]
# top
%6 = aten::to.dtype(%5, f64) : f64[B, S0, 6]
%7 = aten::sigmoid(%6) : f64[B, S0, 6]
%8 = aten::to.dtype(%7, f32) : f32[B, S0, 6]
%9 = aten::mul.Tensor(%5, %8) : f32[B, S0, 6]
%10 = qpcompile::quantize_int4(%9, 0, 1.0) : (i8[B, S0, 6], f32[B, S0, 1])
%11 = operator.getitem(%10, 0) : i8[B, S0, 6]
return y = %11
""",
    )


def test_numbers(apply: Apply) -> None:
    graph = traced(Normed(), TOKENS)
    reference, _ = torch.ops.qpcompile.quantize_int4(Normed(plain=True).double()(TOKENS["x"].double()).float(), 0, 1.0)
    expected = run(graph, **TOKENS)["y"]
    assert apply(fused(graph), WidenSums())
    found = run(graph, **TOKENS)["y"]
    assert torch.equal(found, expected) and torch.equal(found, reference)


def test_patches_are_widened(apply: Apply) -> None:
    pictures = {"x": torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(2))}
    graph = traced(Patches(4), pictures)
    expected = run(graph, **pictures)["y"]
    assert apply(fused(graph), WidenSums())
    assert wide(graph) == 1
    assert relative(run(graph, **pictures)["y"], expected) < 1e-6


def test_overlapping_patches_are_not(apply: Apply) -> None:
    graph = traced(Patches(2), {"x": torch.randn(2, 3, 8, 12)})
    assert not apply(fused(graph), WidenSums())


def test_nothing_is_widened_where_nothing_is_quantized(apply: Apply) -> None:
    assert not apply(fused(traced(Normed(plain=True), TOKENS)), WidenSums())


def test_half_precision_stays(apply: Apply) -> None:
    graph = traced(Normed().bfloat16(), {"x": TOKENS["x"].bfloat16()})
    assert not apply(fused(graph), WidenSums())


def test_the_head_stays(apply: Apply) -> None:
    head = traced(nn.Sequential(nn.Linear(WIDTH, 3)), {"input": TOKENS["x"]}, name=HEAD)
    program = program_of(traced(Normed(), TOKENS), head, stage="fused")
    assert apply(program, WidenSums())
    assert not wide(head) and list(calls(head, aten.linear.default))


def test_broken_stage_order_is_named() -> None:
    program = program_of(traced(Normed(), TOKENS), stage="quantized")
    with pytest.raises(InvariantError, match="widen_sums runs at the stage fused, the program is quantized"):
        run_passes(program, [WidenSums()])
