"""Features added to the rows of a mask become a sum over all tokens."""

from __future__ import annotations

import expecttest
import pytest
import torch
from programs import run, traced
from torch import Tensor, nn

from qpcompile.capture.packed_rows import spread_packed_rows
from qpcompile.ir.edit import tidy
from qpcompile.ir.program import Graph
from qpcompile.ir.text import graph_text


class Added(nn.Module):
    """Features that are added to the rows of a mask, as a deepstack writes it."""

    def forward(self, inputs_embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        hidden = torch.sin(inputs_embeds)
        hidden = hidden.masked_scatter(mask, (hidden[mask.squeeze(-1)] + features).view(-1))
        return torch.cos(hidden)


class Replaced(nn.Module):
    """The rows of a mask that become features, times something."""

    def forward(self, inputs_embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        hidden = torch.sin(inputs_embeds)
        return hidden.masked_scatter(mask, (hidden[mask.squeeze(-1)] * features).view(-1))


def feeds(rows: int, tokens: list[list[int]]) -> dict[str, Tensor]:
    """Embeddings of six tokens, and features of those given for each row."""
    mask = torch.zeros(rows, 6, 1, dtype=torch.bool)
    for row, places in enumerate(tokens):
        mask[row, places] = True
    made = torch.Generator().manual_seed(0)
    embeds, features = (torch.randn(*shape, 4, generator=made) for shape in ((rows, 6), (int(mask.sum()),)))
    return {"inputs_embeds": embeds, "mask": mask, "features": features}


def graph_of(module: nn.Module) -> Graph:
    axes = {"inputs_embeds": (0, 1), "mask": (0, 1), "features": (0,)}
    return traced(module, feeds(2, [[1, 2, 3], [4, 5]]), axes=axes)


@pytest.fixture(scope="module")
def spread() -> Graph:
    graph = graph_of(Added())
    assert spread_packed_rows(graph) == 1
    tidy(graph)
    return graph


def test_golden(spread: Graph) -> None:
    expecttest.assert_expected_inline(
        graph_text(spread),
        """\
graph prefill of model
%0 = input inputs_embeds : f32[B, S0, 4]
%1 = input mask : bool[B, S0, 1]
%2 = input features : f32[S1, 4]
%3 = aten::zeros_like(%0) : f32[B, S0, 4]
%4 = aten::masked_scatter(%3, %1, %2) : f32[B, S0, 4]
# top
%5 = aten::sin(%0) : f32[B, S0, 4]
%6 = aten::add.Tensor(%5, %4) : f32[B, S0, 4]
%7 = aten::cos(%6) : f32[B, S0, 4]
return y = %7
""",
    )


@pytest.mark.parametrize("tokens", [[[0, 1], [3]], [[], [5]], [[], []]])
def test_the_sum_is_the_scatter(spread: Graph, tokens: list[list[int]]) -> None:
    given = feeds(2, tokens)
    assert torch.equal(run(spread, **given)["y"], Added()(**given))


def test_a_second_time_and_another_operator_change_nothing(spread: Graph) -> None:
    other = graph_of(Replaced())
    for graph in (spread, other):
        text = graph_text(graph)
        assert spread_packed_rows(graph) == 0 and graph_text(graph) == text
