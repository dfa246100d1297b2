"""An indexer that groups tokens drops the groups that no row fills: the graph knows their number by the tokens'."""

from __future__ import annotations

import pytest
import torch
from programs import run, traced
from torch import Tensor, nn

from qpcompile.capture.adapters import traceable
from qpcompile.capture.trace import check_sizes
from qpcompile.errors import CaptureError


class Pools(nn.Module):
    """Sums of `index_kpool` tokens of f[B, S, C], the last channel of which is 0 for padding on the left."""

    index_kpool = 4

    def get_pooled_states(self, packed_states: Tensor) -> tuple[Tensor, Tensor]:
        rows, tokens = packed_states.shape[:2]
        first = (packed_states[..., -1] == 0).sum(-1)
        pools = (tokens + self.index_kpool - 1) // self.index_kpool
        places = first[:, None, None] + torch.arange(pools * self.index_kpool).view(1, pools, self.index_kpool)
        filled = (places < tokens).all(-1)
        groups = packed_states[torch.arange(rows)[:, None, None], places.clamp(max=tokens - 1)]
        sums = (groups.sum(2) * filled[..., None])[:, filled.any(0)]
        return sums, filled[:, filled.any(0)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_pooled_states(packed_states=x)


def padded(tokens: int, *real: int) -> Tensor:
    """f[B, S, 3] with as many real tokens in each row."""
    x = torch.arange(len(real) * tokens * 3.0).view(len(real), tokens, 3) + 1
    for row, count in enumerate(real):
        x[row, : tokens - count] = 0
    return x


def test_groups_are_those_of_the_longest_row() -> None:
    with traceable(Pools()):
        graph = traced(Pools(), {"x": padded(11, 11, 6)}, outputs=["sums", "filled"])
    check_sizes(graph)
    for x in (padded(11, 11, 6), padded(4, 4), padded(9, 9, 8), padded(16, 3, 16)):
        for found, expected in zip(run(graph, x=x).values(), Pools()(x), strict=True):
            assert torch.equal(found, expected)
    # No row is without padding: a group more, which the second result says is none.
    sums, filled = run(graph, x=padded(8, 7, 5)).values()
    assert sums.shape[1] == 2 and filled.tolist() == [[True, False]] * 2


def test_without_the_replacement_the_number_depends_on_values() -> None:
    graph = traced(Pools(), {"x": padded(11, 11, 6)}, outputs=["sums", "filled"])
    with pytest.raises(CaptureError, match="depends on values, not on sizes"):
        check_sizes(graph)


def test_other_selections_in_such_a_method_stay() -> None:
    class Strided(Pools):
        def get_pooled_states(self, packed_states: Tensor) -> tuple[Tensor, Tensor]:
            kept = packed_states[:, ::4]
            return kept, kept[kept[..., 0] > 9]

    with traceable(Strided()):
        found = Strided()(padded(11, 11, 6))
    assert found[0].shape[1] == 2 and found[1].ndim == 2
