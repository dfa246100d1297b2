"""Rows tracked through reshapes, permutations and merges: the table lists the source rows of each result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run, traced
from torch import Tensor, nn

from qpcompile.errors import PlanError
from qpcompile.ir.program import VISION, Graph
from qpcompile.ir.shapes import add_output
from qpcompile.pruning.visual_rows import follow_rows

WIDTH = 6


class Rowwise(nn.Module):
    """Norm, linear, gate and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.linear(self.norm(x))) * 2.0


class Merger(nn.Module):
    """Packed rows: merged four by four, a linear, then a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.linear = Rowwise(), nn.Linear(4 * WIDTH, 5)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        return self.linear(self.before(x).view(-1, 4 * WIDTH))[order]


class Shuffle(nn.Module):
    """Pictures of 4 x 4 patches, squares of 2 x 2 merged by two reshapes: f[B, 16, C] -> f[B, 4, 4 C]."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.view(-1, 4, 2, 2 * WIDTH).permute(0, 2, 1, 3)
        return pairs.reshape(-1, 2, 2, 4 * WIDTH).permute(0, 2, 1, 3).flatten(1, 2)


def table_of(graph: Graph, **inputs: Tensor) -> Tensor | None:
    """The result of follow_rows on inputs of another size than the traced one."""
    found = follow_rows(graph, graph.placeholder("x"), graph.result("y"))
    if found is None:
        return None
    add_output(graph, "table", found)
    graph.module.recompile()
    return run(graph, **inputs)["table"]


def test_what_keeps_rows_has_no_table() -> None:
    graph = traced(Rowwise(), {"x": torch.randn(2, 5, WIDTH)}, name=VISION)
    before = len(graph.nodes)
    assert table_of(graph, x=torch.randn(3, 7, WIDTH)) is None
    assert len(graph.nodes) == before


@settings(deadline=None, max_examples=5)
@given(st.permutations(range(6)))
def test_merged_and_reordered(order: list[int]) -> None:
    inputs = {"x": torch.randn(12, WIDTH), "order": torch.tensor([2, 0, 1])}
    graph = traced(Merger(), inputs, name=VISION, axes={"x": [0], "order": [0]})
    found = table_of(graph, x=torch.randn(24, WIDTH), order=torch.tensor(order))
    assert found is not None
    assert found.tolist() == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in order]


def test_squares_by_permutation() -> None:
    graph = traced(Shuffle(), {"x": torch.randn(2, 16, WIDTH)}, name=VISION, axes={"x": [0]})
    found = table_of(graph, x=torch.randn(3, 16, WIDTH))
    assert found is not None
    numbers = torch.arange(3 * 16).view(3, 16, 1).expand(3, 16, WIDTH).float()
    expected = Shuffle()(numbers).unflatten(-1, (4, WIDTH))
    assert torch.equal(found.sort(-1).values, expected[..., 0].sort(-1).values.long())
    squares = numbers[..., 0].view(3, 2, 2, 2, 2).transpose(2, 3).reshape(3, 4, 4)
    assert torch.equal(found.sort(-1).values, squares.long())


class Interleaved(nn.Module):
    """The merge of Mistral 3: the channels of neighbours are interleaved."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, WIDTH).transpose(1, 2).flatten(1)


class Mixed(nn.Module):
    """Every row is added to the following ones."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class Appended(nn.Module):
    """A row of zeros is prepended."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:1] * 0, x])


class Elsewhere(nn.Module):
    """The result does not depend on the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(3, WIDTH)


@pytest.mark.parametrize(
    ("module", "operator"), [(Interleaved(), "transpose"), (Mixed(), "cumsum"), (Appended(), "cat"), (Elsewhere(), "")]
)
def test_refuses_what_cannot_be_followed(module: Any, operator: str) -> None:
    graph = traced(module, {"x": torch.randn(8, WIDTH)}, name=VISION, axes={"x": [0]})
    with pytest.raises(PlanError, match=f"to its output through aten.{operator}"):
        table_of(graph)
