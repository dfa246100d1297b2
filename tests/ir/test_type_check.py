"""Types of a graph's values: derived at the sizes of the traced sample, and refused if the graph records others."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import traced
from torch import Tensor, nn

from qpcompile.errors import ArtifactError
from qpcompile.ir.edit import calls, get_tensor, set_tensor
from qpcompile.ir.operators import LINEAR_W8A16, QUANTIZE_DYNAMIC
from qpcompile.ir.program import Graph
from qpcompile.ir.type_check import check_values, example_sizes
from qpcompile.ir.types import TYPE, UNKNOWN, parse_type, type_of, value_types
from qpcompile.kernels.linear_w8a16.reference import quantize_rows


class Heads(nn.Module):
    """Grouped attention, where torch divides the numbers of heads."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


class Step(nn.Module):
    """A linear with a bias, a linear on 8 bits, and arithmetic on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        codes, scale = quantize_rows(torch.randn(5, 6))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.ops.qpcompile.linear_w8a16(self.up(x), self.codes, self.scale, None)
        longer = torch.cat([past, y], dim=1)
        mask = torch.arange(longer.shape[1])[None].expand(x.shape[0], -1)
        q, _ = torch.ops.qpcompile.quantize_dynamic(longer, 0, 1.0, 4)
        return longer, mask, q


@pytest.fixture
def graph() -> Graph:
    """The step as it is read from a file: with recorded types."""
    return as_read(
        traced(Step(), {"x": torch.randn(2, 3, 4), "past": torch.randn(2, 7, 5)}, outputs=("longer", "mask", "q"))
    )


def as_read(made: Graph) -> Graph:
    """The graph with recorded types in place of fake values."""
    made.constants |= example_sizes(made)
    types = value_types(made)
    for node in made.nodes:
        if node.op != "output":
            node.meta = {TYPE: types[node]}
    return made


def retype(graph: Graph, target: object, text: str) -> None:
    next(calls(graph, target)).meta[TYPE] = parse_type(text)


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Graph], None]:
    """Change a tensor, and the type that is recorded for it."""

    def bend(graph: Graph) -> None:
        changed = change(get_tensor(graph.module, name).detach())
        set_tensor(graph.module, name, changed)
        for node in graph.nodes:
            if node.op == "get_attr" and node.target == name:
                node.meta[TYPE] = type_of(changed)

    return bend


def lose_sizes(graph: Graph) -> None:
    graph.constants.clear()


BENT: dict[str, tuple[Callable[[Graph], None], str]] = {
    "a bias of one": (replace("up.bias", lambda each: each[:1]), r"aten::linear, operand bias"),
    "a narrower weight": (replace("up.weight", lambda each: each[:, :3]), r"aten::linear, operand weight"),
    "fewer outputs": (replace("up.weight", lambda each: each[:5]), r"aten::linear, operand bias"),
    "scales of f64": (replace("scale", lambda each: each.double()), r"linear_w8a16, operand weight_scale"),
    "one scale": (replace("scale", lambda each: each[:1]), r"linear_w8a16, operand weight_scale"),
    "wider codes": (replace("codes", lambda each: each.repeat(1, 2)), r"linear_w8a16, operand weight"),
    "another width": (lambda graph: retype(graph, LINEAR_W8A16, "f32[B, S0, 50]"), "recorded as .*50.* and is f32"),
    "another length": (lambda graph: retype(graph, LINEAR_W8A16, "f32[B, S0+1, 5]"), r"recorded as .*S0\+1"),
    "another rank": (lambda graph: retype(graph, LINEAR_W8A16, "f32[B, 5]"), "recorded as"),
    "a tensor for two": (lambda graph: retype(graph, QUANTIZE_DYNAMIC, "i8[B, S0+S1, 5]"), "recorded as"),
    "no example sizes": (lose_sizes, "no example of the sizes"),
}


def test_what_was_traced_fits(graph: Graph) -> None:
    check_values(graph)


@pytest.mark.parametrize(("bend", "message"), BENT.values(), ids=list(BENT))
def test_bent_graph_is_refused_by_name(graph: Graph, bend: Callable[[Graph], None], message: str) -> None:
    bend(graph)
    with pytest.raises(ArtifactError, match=message) as error:
        check_values(graph)
    assert error.value.do and str(error.value.where).startswith("graph/prefill.json, %")


def test_a_symbol_of_the_inside_is_what_it_was_first(graph: Graph) -> None:
    retype(graph, LINEAR_W8A16, "f32[B, S9, 5]")
    check_values(graph)
    retype(graph, QUANTIZE_DYNAMIC, "(i8[B, S9, 5], f32[B, S9, 1])")
    with pytest.raises(ArtifactError, match="recorded as"):
        check_values(graph)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_torch_would_divide_by_are_refused_before_it_is_asked(heads: int) -> None:
    inputs = {"q": torch.randn(2, 3, 4, 8), "k": torch.randn(2, 3, 2, 8)}
    graph = as_read(traced(Heads(), inputs, outputs=("y",)))
    check_values(graph)
    for node in graph.nodes:
        if node.op != "output":
            node.meta[TYPE] = parse_type(str(node.meta[TYPE]).replace(", 2, ", f", {heads}, "))
    with pytest.raises(ArtifactError, match="aten::scaled_dot_product_attention, operand key"):
        check_values(graph)


class Small(nn.Module):
    """Sums of small tensors, to be mutated."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, 4).sum()


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (torch.ops.aten.expand.default, ([-1, 10**15],)),
        (torch.ops.aten.repeat.default, ([1, 10**9],)),
        (torch.ops.aten.new_ones.default, ([2 * 10**9],)),
    ],
    ids=str,
)
def test_results_without_proportion_are_refused(target: object, args: tuple[object, ...]) -> None:
    graph = as_read(traced(Small(), {"x": torch.randn(2, 4)}))
    node = next(iter(calls(graph, torch.ops.aten.expand.default)))
    node.target, node.args = target, (node.args[0], *args)  # type: ignore[assignment]
    node.meta[TYPE] = UNKNOWN
    with pytest.raises(ArtifactError, match="elements; from these operands at most"):
        check_values(graph)


def test_numbers_that_grow_are_refused(graph: Graph) -> None:
    node = next(node for node in graph.nodes if node.op == "call_function")
    with graph.module.graph.inserting_before(node):
        number = graph.module.graph.call_function(operator.mul, (2**62, 2**62))
    number.meta[TYPE] = UNKNOWN
    with pytest.raises(ArtifactError, match="more than 64 bits"):
        check_values(graph)
