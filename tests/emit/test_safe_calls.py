"""Calls that torch does not check are refused if their arguments are invalid."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from qpcompile.emit.artifact.safe_calls import bad_call
from qpcompile.ir.operators import ACTIVATION

aten = torch.ops.aten


def nodes() -> tuple[fx.Node, fx.Node]:
    """An input and the name of a weight."""
    made = fx.Graph()
    return made.placeholder("x"), made.create_node("get_attr", "w")


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    found = next(each for each in args if isinstance(each, fx.Node))
    return found.graph.call_function(target, args, kwargs)


def test_only_memory_of_the_graph_is_written_to() -> None:
    for own in nodes():
        pair = call(aten.split.Tensor, own, 1)
        for same in (
            own,
            call(aten.alias.default, own),
            call(aten.t.default, call(aten.view.default, own, [2])),
            call(aten.contiguous.default, own),
            call(aten.reshape.default, call(aten.slice.Tensor, own), [2]),
            call(operator.getitem, pair, 0),
        ):
            assert "not the graph's own" in bad_call(aten.copy_.default, (same, own), {}), same.format_node()
        made = call(aten.slice.Tensor, call(aten.clone.default, own))
        assert bad_call(aten.copy_.default, (made, own), {}) == ""


def test_whole_numbers_are_divided_as_torch_checks_it() -> None:
    x, _ = nodes()
    assert "'trunc'" in bad_call(aten.div.Tensor_mode, (x, x), {"rounding_mode": "trunc"})
    assert bad_call(aten.div.Tensor_mode, (x, x), {"rounding_mode": "floor"}) == ""
    assert bad_call(aten.div.Tensor_mode, (x, x), {"rounding_mode": None}) == ""


@pytest.mark.parametrize(("modes", "fine"), [((0, 0), True), ((2, 2), True), ((7, 0), False), ((0, -1), False)])
def test_grids_are_sampled_in_modes_that_there_are(modes: tuple[int, int], fine: bool) -> None:
    x, grid = nodes()
    assert (bad_call(aten.grid_sampler_2d.default, (x, grid, *modes, False), {}) == "") is fine


def test_parts_are_counted_from_the_first() -> None:
    x, _ = nodes()
    pair = call(aten.split.Tensor, x, 1)
    assert bad_call(operator.getitem, (pair, 1), {}) == ""
    assert "the number of a part" in bad_call(operator.getitem, (pair, -1), {})


def test_operands_of_our_operators_are_given_in_order() -> None:
    """What binds them to kernels reads places; an operand by name would be another one, or none."""
    x, _ = nodes()
    assert bad_call(ACTIVATION, (x, None, "silu"), {}) == ""
    assert "no argument by name, as 'function'" in bad_call(ACTIVATION, (x, None), {"function": "silu"})
