"""Symbolic sizes: compared without guards, created, propagated through an edited graph."""

from __future__ import annotations

import pytest
import torch
from programs import traced
from torch import Tensor, nn

from qpcompile.ir.edit import aten, calls
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import add_input, add_output, expression, new_size, propagate, same, token_axes, value


class Scores(nn.Module):
    """f[B, S, 4] -> f[B, S, S]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) @ x.transpose(1, 2)


@pytest.fixture
def graph() -> Graph:
    return traced(Scores(), {"x": torch.ones(2, 5, 4)})


def test_sizes_are_compared_as_expressions(graph: Graph) -> None:
    batch, length, width = value(graph.placeholder("x")).shape
    assert same(length, length) and same(length + 1 - 1, length) and same(width, 4)
    assert not same(batch, length) and not same(length, 5)
    assert expression(7) == 7 and expression(length * 2) == 2 * expression(length)


def test_token_axes(graph: Graph) -> None:
    length = value(graph.placeholder("x")).shape[1]
    assert token_axes(graph.result("y"), length) == [1, 2]
    assert token_axes(graph.placeholder("x"), length) == [1]
    size = torch.empty(0)
    node = graph.placeholder("x")
    node.meta["val"] = length
    assert token_axes(node, length) == [] and size.numel() == 0


def test_new_size_is_a_symbol_of_its_own(graph: Graph) -> None:
    first, second = new_size(graph, "first", 7), new_size(graph, "second", 7)
    assert isinstance(first, torch.SymInt)
    assert not same(first, second) and not same(first, value(graph.placeholder("x")).shape[1])


def test_new_inputs_and_outputs_run(graph: Graph) -> None:
    slots = new_size(graph, "slots", 3)
    node = add_input(graph, "extra.0", (slots,), torch.int64)
    add_output(graph, "copy", node)
    graph.module.recompile()
    x, extra = torch.ones(3, 6, 4), torch.arange(9)
    assert graph.inputs == ("x", "extra.0") and graph.outputs == ("y", "copy")
    results = graph({"x": x, "extra.0": extra})
    assert torch.equal(results["copy"], extra) and results["y"].shape == (3, 6, 6)


@pytest.mark.parametrize("from_start", [True, False])
def test_propagate_follows_an_edit(graph: Graph, from_start: bool) -> None:
    x = graph.placeholder("x")
    shape = list(value(x).shape)
    x.meta["val"] = value(x)[:, 1:]
    propagate(graph, None if from_start else next(calls(graph, aten.relu.default)))
    assert [expression(size) for size in value(graph.result("y")).shape[1:]] == [expression(shape[1]) - 1] * 2
