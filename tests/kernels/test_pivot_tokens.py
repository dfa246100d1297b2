"""pivot_tokens against a plain loop in numpy, small budgets, rows of their own, in torch and ONNX."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.pivot_tokens.op import OVERLOAD, pivot_tokens

Array = np.ndarray[Any, Any]
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def case(batch: int, length: int, width: int = 12, seed: int = 0) -> Case:
    """Row i has i padding tokens, a word, visual tokens up to two thirds, then text."""
    made = torch.Generator().manual_seed(seed)
    places = torch.arange(length).expand(batch, length) - torch.arange(batch)[:, None]
    visual = (places >= 1) & (places < 2 * length // 3)
    hidden = torch.randn(batch, length, width, generator=made)
    return hidden, torch.randn(batch, 2, length, 5, generator=made), visual, places >= 0


def by_loops(
    hidden: Array, keys: Array, visual: Array, valid: Array, budget: int, pivots: tuple[int, int]
) -> tuple[set[int], set[int]]:
    """One row: the visual pivots, and what all pivots took."""
    own = [i for i in range(len(hidden)) if visual[i] and valid[i]]
    text = [i for i in range(len(hidden)) if valid[i] and not visual[i] and own and i > own[0]]
    size = np.abs(keys).sum(axis=(0, 2))
    budget = min(budget, len(own))
    first = sorted(own, key=lambda i: (-size[i], i))[: min(pivots[0], budget)]
    second = sorted(text, key=lambda i: (-size[i], i))[: pivots[1]]
    everyone, left = [*first, *second], budget - len(first)
    taken: set[int] = set()
    for place, pivot in enumerate(everyone):
        share = left // len(everyone) + (place < left % len(everyone))
        cosine = {i: hidden[i] @ hidden[pivot] / np.linalg.norm(hidden[i]) for i in own}
        free = [i for i in own if i not in taken and i not in first]
        taken |= set(sorted(free, key=lambda i: (cosine[i], i))[:share])
    return set(first), taken


@pytest.mark.parametrize("pivots", [(4, 4), (1, 0), (0, 2), (3, 30)])
@pytest.mark.parametrize("length", [5, 12, 40])
def test_equals_loops(length: int, pivots: tuple[int, int]) -> None:
    hidden, keys, visual, valid = case(3, length)
    for budget in ([0, 1, 2], [3, 5, 7], [length, length, length]):
        found = pivot_tokens(hidden, keys, visual, valid, torch.tensor(budget), *pivots)
        for row, asked in enumerate(budget):
            arrays = [each[row].double().numpy() for each in (hidden, keys)]
            masks = [each[row].numpy() for each in (visual, valid)]
            first, taken = by_loops(arrays[0], arrays[1], masks[0], masks[1], asked, pivots)
            assert set((found[row] == 2).nonzero().flatten().tolist()) == first
            assert set((found[row] == 1).nonzero().flatten().tolist()) == taken
            if pivots[0]:
                assert len(first) + len(taken) == min(asked, int((visual & valid)[row].sum()))


def test_rows_are_independent() -> None:
    hidden, keys, visual, valid = case(3, 40)
    together = pivot_tokens(hidden, keys, visual, valid, torch.tensor([9, 10, 11]), 4, 4)
    for row in range(3):
        alone = (hidden[row : row + 1, row:], keys[row : row + 1, :, row:])
        masks = (visual[row : row + 1, row:], valid[row : row + 1, row:])
        assert torch.equal(pivot_tokens(*alone, *masks, torch.tensor([9 + row]), 4, 4)[0], together[row, row:])


def test_equal_tokens_tie_by_index() -> None:
    hidden, keys, visual, valid = case(1, 30)
    hidden, keys = hidden[:, :1].expand(1, 30, 12), keys[:, :, :1].expand(1, 2, 30, 5)
    kept = pivot_tokens(hidden, keys, visual, valid, torch.tensor([6]), 4, 4) > 0
    assert kept[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_opcheck_and_refusals() -> None:
    torch.library.opcheck(pivot_tokens, (*case(2, 9), torch.tensor([2, 3]), 4, 4))
    with pytest.raises(KernelError, match="there must be a pivot"):
        pivot_tokens(*case(2, 9), torch.tensor([2, 3]), 0, 0)


class Choose(torch.nn.Module):
    """A third of the visual tokens of each row."""

    def forward(self, hidden: Tensor, visual: Tensor, valid: Tensor) -> Tensor:
        budget = ((visual & valid).sum(1) + 2) // 3
        return pivot_tokens(hidden, hidden[:, None] * 2, visual, valid, budget, 4, 4)


def test_onnx_picks_the_same_tokens(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.pivot_tokens.onnx import pivot_tokens as translation

    hidden, _, visual, valid = case(2, 12)
    exported = export_onnx(Choose(), (hidden, visual, valid), {OVERLOAD: translation})
    for batch, length in ((1, 3), (1, 6), (3, 17), (2, 63), (1, 200)):
        hidden, _, visual, valid = case(batch, length, seed=length)
        assert torch.equal(exported(hidden, visual, valid)[0], Choose()(hidden, visual, valid)), length
