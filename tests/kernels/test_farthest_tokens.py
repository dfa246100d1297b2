"""farthest_tokens against max-min by brute force in numpy, in torch and ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.farthest_tokens.op import OVERLOAD, farthest_tokens


def picked(priority: Tensor) -> list[int]:
    """The picked tokens of one row, in the order of picking."""
    ranked = torch.argsort(priority, descending=True, stable=True)
    return [int(i) for i in ranked if priority[i] > 0]


def by_distances(features: np.ndarray, counted: np.ndarray, turns: int) -> list[int]:
    """Greedy max-min on the whole matrix of distances."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    own = [int(i) for i in np.flatnonzero(counted)]
    chosen: list[int] = []
    for _ in range(turns):
        free = [i for i in own if i not in chosen]
        against = [[j for j in own if j != i] for i in free] if not chosen else [chosen] * len(free)
        nearest = [min((distance[i, j] for j in others), default=0.0) for i, others in zip(free, against, strict=True)]
        chosen.append(free[int(np.argmax(nearest))])
    return chosen


def case(batch: int, length: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random features; row i counts all but the first i and the last token, and picks a third and i more."""
    made = torch.Generator().manual_seed(seed)
    counted = torch.arange(length).expand(batch, length) >= torch.arange(batch)[:, None]
    counted = counted & (torch.arange(length) < max(1, length - 1))
    budget = torch.minimum(torch.full((batch,), length // 3 + 1) + torch.arange(batch), counted.sum(1))
    return torch.randn(batch, length, width, generator=made), counted, budget


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(0, 10_000), st.data())
def test_every_turn_takes_the_farthest(length: int, seed: int, data: st.DataObject) -> None:
    features, counted, _ = case(1, length, 5, seed)
    turns = data.draw(st.integers(0, int(counted.sum())))
    found = picked(farthest_tokens(features, counted, torch.tensor([turns]))[0])
    assert found == by_distances(features[0].double().numpy(), counted[0].numpy(), turns)


def test_by_hand() -> None:
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0], [0.1, 1.0]]])
    everything = torch.ones(1, 5, dtype=torch.bool)
    # 3 is alone on its side; 1 is nearly opposite, 0 exactly; of the perpendicular ones 4 leans towards 0.
    assert picked(farthest_tokens(features, everything, torch.tensor([3]))[0]) == [3, 0, 2]


def test_equal_tokens_tie_by_index_and_fill_the_budget() -> None:
    features = torch.randn(1, 1, 24).expand(1, 9, 24) * torch.rand(1, 9, 1).add(0.1)
    assert picked(farthest_tokens(features, torch.ones(1, 9, dtype=torch.bool), torch.tensor([4]))[0]) == [0, 1, 2, 3]


def test_prefixes_are_nested_and_rows_are_independent() -> None:
    features, counted, budget = case(3, 40, 6)
    whole = farthest_tokens(features, counted, torch.full((3,), 39))
    together = farthest_tokens(features, counted, budget)
    for row, turns in enumerate(budget.tolist()):
        assert picked(together[row])[:turns] == picked(whole[row])[:turns]
        mine = farthest_tokens(features[row : row + 1, row:], counted[row : row + 1, row:], budget[row : row + 1])[0]
        assert [index + row for index in picked(mine)] == picked(together[row])[:turns]


def test_nothing_counts() -> None:
    features, counted, budget = case(2, 7, 5)
    assert not farthest_tokens(features, torch.zeros_like(counted), budget).any()


def test_opcheck_and_refusals() -> None:
    torch.library.opcheck(farthest_tokens, case(2, 9, 5))
    features, counted, budget = case(2, 9, 5)
    with pytest.raises(KernelError, match="budget is i32"):
        farthest_tokens(features, counted, budget.int())


class Choose(torch.nn.Module):
    """A third of the counted tokens of each row."""

    def forward(self, features: Tensor, counted: Tensor) -> Tensor:
        return farthest_tokens(features, counted, (counted.sum(1) + 2) // 3)


def test_onnx_picks_the_same_tokens(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.farthest_tokens.onnx import farthest_tokens as translation

    exported = export_onnx(Choose(), case(2, 12, 24)[:2], {OVERLOAD: translation})
    for batch, length in ((1, 1), (1, 6), (3, 17), (2, 63), (1, 200)):
        inputs = case(batch, length, 24, seed=length)[:2]
        assert torch.equal(exported(*inputs)[0], Choose()(*inputs)), length
