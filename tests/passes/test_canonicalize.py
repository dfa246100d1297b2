"""Canonical forms, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from programs import Nothing, program_of, run, traced
from torch import Tensor, nn
from toy_decoder import EPS, Norm

from qpcompile.errors import InvariantError
from qpcompile.ir.edit import aten, calls
from qpcompile.ir.operators import RMSNORM
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.ir.verify import verify
from qpcompile.passes.canonicalize import Canonicalize

Apply = Callable[[Program, Canonicalize], bool]
TOKENS = {"x": torch.linspace(-2, 3, 80).view(2, 5, 8)}


class Wordy(nn.Module):
    """All patterns that the pass rewrites, duplicated where possible."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.register_buffer("empty", torch.zeros(2, 0, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.get_buffer("empty"), nn.functional.dropout(x.detach(), 0.1, self.training)], dim=1)
        return torch.cos(self.norm(x[:, :]).to(torch.float32)) + torch.cos(self.norm(x))


@pytest.fixture(scope="module")
def wordy() -> Graph:
    return traced(Wordy(), TOKENS, axes={"x": (1,)})


def test_golden(apply: Apply, wordy: Graph) -> None:
    expected = run(wordy, **TOKENS)["y"]
    program = program_of(wordy)
    assert apply(program, Canonicalize())
    expecttest.assert_expected_inline(
        graph_text(wordy),
        """\
graph prefill of model
%0 = input x : f32[2, S0, 8]
# norm
@norm.weight : f32[8]
%1 = qpcompile::rmsnorm(%0, @norm.weight, 1e-06) : f32[2, S0, 8]
# top
%2 = aten::cos(%1) : f32[2, S0, 8]
%3 = aten::add.Tensor(%2, %2) : f32[2, S0, 8]
return y = %3
""",
    )
    assert torch.equal(run(wordy, **TOKENS)["y"], expected)


def test_nothing_to_do(apply: Apply) -> None:
    assert not apply(program_of(), Canonicalize())


class OnePlus(nn.Module):
    """The norm whose weight is stored minus one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 8).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class Twice(nn.Module):
    """Two norms with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = OnePlus()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x) + 1)


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        (Norm(), torch.float32),
        (Norm(), torch.bfloat16),
        (Norm().half(), torch.float16),
        (OnePlus(), torch.float32),
        (OnePlus(torch.bfloat16), torch.bfloat16),
        (OnePlus(torch.float16), torch.float32),
        (Twice(), torch.float32),
    ],
    ids=["f32", "bf16 with f32 weight", "f16", "one plus", "one plus, bf16", "one plus f16", "one weight, two norms"],
)
def test_norms_become_one_node_with_equal_bits(apply: Apply, module: nn.Module, dtype: torch.dtype) -> None:
    feeds = {"x": TOKENS["x"].to(dtype)}
    graph = traced(module, feeds)
    expected = run(graph, **feeds)["y"]
    assert apply(program_of(graph), Canonicalize())
    assert list(calls(graph, RMSNORM)) and not list(calls(graph, aten.rsqrt.default))
    found = run(graph, **feeds)["y"]
    assert found.dtype == expected.dtype and torch.equal(found, expected)


class Almost(nn.Module):
    """A norm that differs from the operator's; `kind` says how."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        wide = x if kind == "squares in bf16" else x.to(torch.float64 if kind == "squares in f64" else torch.float32)
        mean = wide.pow(2).mean([-1, -2] if kind == "mean over tokens" else -1, keepdim=True)
        if kind == "mean without its axis":
            mean = wide.pow(2).mean(-1).sum(-1)[:, None, None]
        power = wide.pow(3).mean(-1, keepdim=True).abs() if kind == "cubes" else mean
        root = torch.rsqrt(power + (x[:1, :1, :1].float() if kind == "eps is computed" else EPS))
        narrow = (wide * root).to(torch.float16 if kind == "narrowed to another type" else x.dtype)
        weight = self.weight * 2 if kind == "weight is computed" else self.weight
        y = weight * narrow
        return y + narrow.sum() if kind == "a second reader" else y


NEAR_MISSES = {
    "squares in bf16": torch.bfloat16,
    "squares in f64": torch.float32,
    "mean over tokens": torch.float32,
    "mean without its axis": torch.float32,
    "cubes": torch.float32,
    "eps is computed": torch.float32,
    "narrowed to another type": torch.bfloat16,
    "weight is computed": torch.float32,
    "a second reader": torch.float32,
}


@pytest.mark.parametrize(("kind", "dtype"), NEAR_MISSES.items(), ids=list(NEAR_MISSES))
def test_near_misses_stay(apply: Apply, kind: str, dtype: torch.dtype) -> None:
    feeds = {"x": TOKENS["x"].abs().to(dtype)}
    graph = traced(Almost(kind), feeds)
    expected = run(graph, **feeds)["y"]
    apply(program_of(graph), Canonicalize())
    assert not list(calls(graph, RMSNORM))
    assert torch.equal(run(graph, **feeds)["y"], expected)


class Slices(nn.Module):
    """Slices that drop elements, a cast that rounds, a cache that is not empty."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.ones(2, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.get_buffer("first"), x], dim=1)
        return x[:, 1:].half().float()[:, :, ::2] + x[:, 1:, 4:]


def test_what_looks_like_nothing_but_is_something_stays(apply: Apply) -> None:
    graph = traced(Slices(), TOKENS, axes={"x": (1,)})
    expected = run(graph, **TOKENS)["y"]
    apply(program_of(graph), Canonicalize())
    assert len(list(calls(graph, aten.cat.default))) == 1
    assert len(list(calls(graph, aten.slice.Tensor))) == 3
    assert torch.equal(run(graph, **TOKENS)["y"], expected)


def test_empty_part_of_a_wider_type_widens(apply: Apply) -> None:
    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("empty", torch.zeros(2, 0, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.get_buffer("empty"), x], dim=1)

    graph = traced(Widened(), {"x": TOKENS["x"].half()}, axes={"x": (1,)})
    apply(program_of(graph), Canonicalize())
    assert run(graph, x=TOKENS["x"].half())["y"].dtype == torch.float32


def test_dead_nodes_count_as_a_change(apply: Apply) -> None:
    graph = traced(Nothing(), TOKENS)
    with graph.module.graph.inserting_before(graph.output_node):
        dead = graph.module.graph.call_function(aten.relu.default, (graph.nodes[0],))
    dead.meta["val"] = graph.nodes[0].meta["val"]
    assert apply(program_of(graph), Canonicalize())
    assert len(graph.nodes) == 3


def test_hand_broken_graph_is_named() -> None:
    graph = traced(Wordy(), TOKENS, axes={"x": (1,)})
    program = program_of(graph, stage="canonical")
    program.history.append("canonicalize")
    with pytest.raises(InvariantError, match=r"prefill: .* legal at the stage captured") as error:
        verify(program)
    assert error.value.ran == "canonicalize"


class Alike(nn.Module):
    """Two sums whose arguments are equal in Python only."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 1.0


def test_one_and_one_point_zero_are_not_the_same() -> None:
    feeds = {"x": torch.arange(6).view(2, 3)}
    graph = traced(Alike(), feeds, outputs=("whole", "real"))
    Canonicalize().run(program_of(graph))
    assert [value.dtype for value in run(graph, **feeds).values()] == [torch.int64, torch.float32]
