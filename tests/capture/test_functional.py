"""Operators that write to memory become those that return a tensor, unless another name of the memory is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from qpcompile.capture.functional import make_functional


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    """The function as a graph with shapes, as export gives it."""

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return function(*given)

    return torch.export.export(Module(), inputs).module(check_guards=False)  # type: ignore[return-value]


def writing(module: fx.GraphModule) -> list[str]:
    """The operators of a graph that write to memory."""
    called = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return [str(each) for each in called if isinstance(each, torch._ops.OpOverload) and each._schema.is_mutable]


def divided(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.div_(y)
    return z + z.sum()


def stored(state: Tensor, x: Tensor) -> Tensor:
    before = state.sum()
    state.copy_(x)
    return state * 2 + before


def stored_as_it_is(state: Tensor, x: Tensor) -> Tensor:
    # Casts that change nothing give the state itself; `to(device)` is how a cache prepares its state.
    state.to(torch.float32).to("cpu", torch.float32).copy_(x)
    return state * 2


def through_views(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    row = z[0]
    row[1:].mul_(y[0, 1:])
    return z + z[1] + row


def stored_in_a_row(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[0] = y[0, 0].to(torch.float64)
    return z


def through_a_cast_of_a_view(x: Tensor, y: Tensor) -> Tensor:
    # Nobody reads the view, or what it is a view of, again.
    z = torch.ops.aten.to.dtype_layout((x * 2).view(-1, 3).detach(), dtype=torch.float32, layout=torch.strided)
    z += y.view(-1, 3)
    return z + z.sum()


def through_a_view_of_an_input(x: Tensor, y: Tensor) -> Tensor:
    z = x.view(-1, 3)
    z += y.view(-1, 3)
    return z * 2


def through_a_transpose(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.t().mul_(y.t())
    return z


def with_a_view_read_later(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    row = z[0]
    z.add_(y)
    return row


X, Y = torch.arange(1.0, 7.0).view(2, 3), torch.full((2, 3), 4.0)


def test_results_are_returned_and_inputs_stay() -> None:
    for function in (divided, stored, stored_as_it_is, through_views, stored_in_a_row, through_a_cast_of_a_view):
        expected = function(X.clone(), Y.clone())
        module = traced(function, X.clone(), Y.clone())
        assert len(writing(module)) == 1
        make_functional(module)
        module.recompile()
        assert not writing(module), function.__name__
        assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function"), "shapes"
        x, y = X.clone(), Y.clone()
        assert torch.equal(module(x, y), expected) and torch.equal(x, X) and torch.equal(y, Y)


def test_a_part_is_put_in_its_place() -> None:
    module = traced(through_views, X, Y)
    make_functional(module)
    called = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert called == [
        *("aten.mul.Tensor", "aten.select.int", "aten.slice.Tensor", "aten.select.int", "aten.slice.Tensor"),
        *("aten.mul.Tensor", "aten.slice_scatter.default", "aten.select_scatter.default", "aten.select.int"),
        *("aten.add.Tensor", "aten.add.Tensor"),
    ]


def test_memory_is_filled() -> None:
    module = traced(lambda x: torch.cat([x.new_empty(0, 3), torch.empty(0, 3), x]), X)
    make_functional(module)
    module.recompile()
    assert "empty" not in str([node.target for node in module.graph.nodes]) and torch.equal(module(X), X)


def test_twice_changes_nothing() -> None:
    module = traced(divided, X, Y)
    make_functional(module)
    text = str(module.graph)
    make_functional(module)
    assert str(module.graph) == text


def test_memory_with_another_name_stays_written() -> None:
    for function in (through_a_transpose, with_a_view_read_later, through_a_view_of_an_input):
        module = traced(function, X.clone(), Y.clone())
        text = str(module.graph)
        make_functional(module)
        assert str(module.graph) == text and len(writing(module)) == 1, function.__name__
