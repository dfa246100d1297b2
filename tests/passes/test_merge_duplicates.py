"""Common subexpressions are merged; expressions that only look equal are not."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from programs import program_of, run, traced
from torch import Tensor, fx, nn

from qpcompile.errors import InvariantError
from qpcompile.ir.edit import aten, call, calls
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.passes.merge_duplicates import MergeDuplicates

Apply = Callable[[Program, MergeDuplicates], bool]
VALUES = {
    "x": torch.randn(2, 5, generator=torch.Generator().manual_seed(1)),
    "index": torch.tensor([[4, 0, 2], [1, 1, 3]]),
}


class Twice(nn.Module):
    """Two values gathered with the same indices, as in a cut; the trace has one chain of each kind."""

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        rows = index.unsqueeze(2).expand(-1, -1, 4)
        wide = x.unsqueeze(2).expand(-1, -1, 4)
        return wide.gather(1, rows), wide.neg().gather(1, rows)


def doubled() -> Graph:
    """The graph of `Twice`, whose second gather has separate indices."""
    graph = traced(Twice(), VALUES, outputs=("a", "b"), axes={"index": (0, 1)})
    _, second = calls(graph, aten.gather.default)
    index = graph.placeholder("index")
    own = call(graph, second, aten.expand.default, call(graph, second, aten.unsqueeze.default, index, 2), [-1, -1, 4])
    second.args = (second.args[0], 1, own)
    return graph


def fused(graph: Graph) -> Program:
    return program_of(graph, stage="fused")


def with_calls(*made: tuple[object, tuple[object, ...]]) -> tuple[Graph, list[fx.Node]]:
    """A graph whose outputs are these calls on its input x."""
    graph = traced(nn.Identity(), {"input": VALUES["x"]}, outputs=tuple(f"y{number}" for number in range(len(made))))
    x, end = graph.placeholder("input"), graph.output_node
    nodes = [call(graph, end, target, x, *arguments) for target, arguments in made]
    end.args = (tuple(nodes),)
    return graph, nodes


def test_golden(apply: Apply) -> None:
    graph = doubled()
    assert len(list(calls(graph, aten.unsqueeze.default))) == 3
    assert apply(fused(graph), MergeDuplicates())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[S0, S1]
%1 = input index : i64[B, S2]
# top
%2 = aten::unsqueeze(%1, 2) : i64[B, S2, 1]
%3 = aten::expand(%2, [-1, -1, 4]) : i64[B, S2, 4]
%4 = aten::unsqueeze(%0, 2) : f32[S0, S1, 1]
%5 = aten::expand(%4, [-1, -1, 4]) : f32[S0, S1, 4]
%6 = aten::gather(%5, 1, %3) : f32[B, S2, 4]
%7 = aten::neg(%5) : f32[S0, S1, 4]
%8 = aten::gather(%7, 1, %3) : f32[B, S2, 4]
return a = %6
return b = %8
""",
    )


def test_numbers(apply: Apply) -> None:
    graph = doubled()
    expected = run(graph, **VALUES)
    assert apply(fused(graph), MergeDuplicates())
    found = run(graph, **VALUES)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((aten.unsqueeze.default, (0,)), (aten.unsqueeze.default, (1,))),
        ((aten.neg.default, ()), (aten.abs.default, ())),
        # Equal in Python: 1 == 1.0 == True and 0.0 == -0.0.
        ((aten.mul.Tensor, (1,)), (aten.mul.Tensor, (1.0,))),
        ((aten.mul.Tensor, (0.0,)), (aten.mul.Tensor, (-0.0,))),
        ((aten.bernoulli.default, ()), (aten.bernoulli.default, ())),
        ((aten.bernoulli.p, (0.5,)), (aten.bernoulli.p, (0.5,))),
    ],
)
def test_near_misses_stay(
    apply: Apply, first: tuple[object, tuple[object, ...]], second: tuple[object, tuple[object, ...]]
) -> None:
    graph, nodes = with_calls(first, second)
    assert not apply(fused(graph), MergeDuplicates())
    assert graph.nodes[-3:-1] == nodes


def test_nothing_is_merged_across_a_write(apply: Apply) -> None:
    graph, _ = with_calls((aten.neg.default, ()), (aten.mul_.Tensor, (2,)), (aten.neg.default, ()))
    assert not apply(fused(graph), MergeDuplicates())
    before, _, behind = run(graph, input=VALUES["x"].clone()).values()
    assert torch.equal(behind, 2 * before)


def test_broken_stage_order_is_named() -> None:
    program = program_of(doubled(), stage="quantized")
    with pytest.raises(InvariantError, match="merge_duplicates runs at the stage fused, the program is quantized"):
        run_passes(program, [MergeDuplicates()])
