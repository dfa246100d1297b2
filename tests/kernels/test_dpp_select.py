"""dpp_select against the largest determinant in numpy, with ties, dependent tokens and batches, in torch and ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.dpp_select.op import OVERLOAD, dpp_select

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def picked(priority: Tensor) -> list[int]:
    """The picked tokens of one row, in the order of picking."""
    ranked = torch.argsort(priority, descending=True, stable=True)
    return [int(i) for i in ranked if priority[i] > 0]


def greedy_by_determinant(features: np.ndarray, relevance: np.ndarray, counted: np.ndarray, turns: int) -> list[int]:
    """In every step the token that maximises det(L of the picked), by computing each determinant."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    chosen: list[int] = []
    for _ in range(turns):
        free = [i for i in range(len(features)) if counted[i] and i not in chosen]
        dets = [np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])]) for i in free]
        chosen.append(free[int(np.argmax(dets))])
    return chosen


def case(batch: int, length: int, width: int, seed: int = 0) -> Case:
    """Random features; row i counts all but the first i and the last token, and picks a third and i more."""
    made = torch.Generator().manual_seed(seed)
    counted = torch.arange(length).expand(batch, length) >= torch.arange(batch)[:, None]
    counted = counted & (torch.arange(length) < max(1, length - 1))
    budget = torch.minimum(torch.full((batch,), length // 3 + 1) + torch.arange(batch), counted.sum(1))
    features = torch.randn(batch, length, width, generator=made)
    return features, torch.rand(batch, length, generator=made) + 0.1, counted, budget


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 11), st.integers(0, 10_000), st.data())
def test_every_turn_takes_the_largest_determinant(length: int, seed: int, data: st.DataObject) -> None:
    features, relevance, counted, _ = case(1, length, 16, seed)
    turns = data.draw(st.integers(0, int(counted.sum())))
    found = picked(dpp_select(features, relevance, counted, torch.tensor([turns]))[0])
    arrays = (features[0].double().numpy(), relevance[0].double().numpy(), counted[0].numpy())
    assert found == greedy_by_determinant(*arrays, turns)


def test_by_hand() -> None:
    features = torch.tensor([[[2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    relevance = torch.tensor([[0.9, 1.0, 0.2, 0.3]])
    priority = dpp_select(features, relevance, torch.ones(1, 4, dtype=torch.bool), torch.tensor([4]))
    # 1 has the highest relevance; 0 is its copy; 3 leaves 0.3^2 / 2, 2 leaves 0.2^2: then the plane is spanned.
    assert picked(priority[0]) == [1, 3]
    assert priority[0].tolist() == pytest.approx([-0.1, 4.0, -0.8, 3.0])


def test_equal_tokens_tie_by_index() -> None:
    features = torch.randn(1, 1, 24).expand(1, 6, 24) * torch.rand(1, 6, 1)
    features = torch.cat([features, torch.randn(1, 1, 24).expand(1, 31, 24)], dim=1)
    everything = torch.ones(1, 37, dtype=torch.bool)
    assert picked(dpp_select(features, torch.ones(1, 37), everything, torch.tensor([5]))[0]) == [0, 6]


def test_prefixes_are_nested_and_rows_are_independent() -> None:
    features, relevance, counted, budget = case(3, 40, 64)
    whole = dpp_select(features, relevance, counted, torch.full((3,), 39))
    together = dpp_select(features, relevance, counted, budget)
    for row, turns in enumerate(budget.tolist()):
        assert picked(together[row])[:turns] == picked(whole[row])[:turns]
        alone = [each[row : row + 1, row:] for each in (features, relevance, counted)]
        mine = dpp_select(*alone, budget[row : row + 1])[0]
        assert [index + row for index in picked(mine)] == picked(together[row])[:turns]


def test_tokens_that_are_never_picked_are_ordered_by_relevance() -> None:
    features, relevance, counted, _ = case(1, 9, 2)  # rank 2: two picks
    priority = dpp_select(features, relevance, counted, torch.tensor([8]))[0]
    chosen = picked(priority)
    assert len(chosen) == 2
    others = [i for i in range(8) if i not in chosen]
    assert sorted(others, key=lambda i: -priority[i]) == sorted(others, key=lambda i: -relevance[0, i])
    assert priority[8] == 0


def test_nothing_counts_or_nothing_is_asked_for() -> None:
    features, relevance, counted, budget = case(2, 7, 5)
    assert not dpp_select(features, relevance, torch.zeros_like(counted), budget).any()
    none = dpp_select(features, relevance, counted, torch.zeros_like(budget))
    assert (none <= 0).all()
    assert (dpp_select(features, torch.zeros_like(relevance), counted, budget) == 0).all()


def test_opcheck_and_refusals() -> None:
    torch.library.opcheck(dpp_select, case(2, 9, 5))
    features, relevance, counted, budget = case(2, 9, 5)
    with pytest.raises(KernelError, match="counted is f32"):
        dpp_select(features, relevance, counted.float(), budget)
    with pytest.raises(KernelError, match="relevance is f64"):
        dpp_select(features, relevance.double(), counted, budget)


class Choose(torch.nn.Module):
    """A third of the counted tokens of each row."""

    def forward(self, features: Tensor, relevance: Tensor, counted: Tensor) -> Tensor:
        return dpp_select(features, relevance, counted, (counted.sum(1) + 2) // 3)


def test_onnx_picks_the_same_tokens(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.dpp_select.onnx import dpp_select as translation

    exported = export_onnx(Choose(), case(2, 12, 24)[:3], {OVERLOAD: translation})
    for batch, length in ((1, 1), (1, 6), (3, 17), (2, 63), (1, 200)):
        inputs = case(batch, length, 24, seed=length)[:3]
        assert torch.equal(exported(*inputs)[0], Choose()(*inputs)), length
    features, relevance, counted = case(1, 30, 24)[:3]
    copies = (features[:, :1].expand(1, 30, 24).contiguous(), relevance, counted)
    assert torch.equal(exported(*copies)[0], Choose()(*copies))
