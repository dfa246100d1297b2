"""spread_tokens against plain Python: the best of each row, and others at equal steps between them."""

from collections.abc import Callable
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.spread_tokens.op import OVERLOAD, spread_tokens

INF = float("inf")


def brute_force(scores: list[float], counted: list[bool], budget: int, share: float) -> list[float]:
    among = [i for i, flag in enumerate(counted) if flag]
    keep = min(budget, len(among))
    spread = floor(keep * share + 0.5)
    best = sorted(among, key=lambda i: (-scores[i], i))[: keep - spread]
    rest = [i for i in among if i not in best]
    spaced = [rest[step * len(rest) // spread] for step in range(spread)]
    return [2.0 if i in best else 1.0 if i in spaced else 0.0 for i in range(len(scores))]


def test_by_hand() -> None:
    scores = torch.tensor([[9.0, 0.1, 0.5, 0.4, 0.3, 0.2, 9.0, 0.0]])
    counted = torch.tensor([[False, True, True, True, True, True, False, True]])
    # Budget 4, half of it spread: 2 and 3 are best; of 1, 4, 5, 7 every second one.
    found = spread_tokens(scores, counted, torch.tensor([4]), 0.5)
    assert found.tolist() == [[0, 1, 2, 2, 0, 1, 0, 0]]


@settings(deadline=None)
@given(st.data())
def test_equals_brute_force(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 40))
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=length, max_size=length))
    counted = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    budget = data.draw(st.integers(0, length + 2))
    share = data.draw(st.sampled_from([0.0, 0.15625, 0.5, 0.75, 1.0]))
    found = spread_tokens(torch.tensor([scores]), torch.tensor([counted]), torch.tensor([budget]), share)
    assert found[0].tolist() == brute_force(scores, counted, budget, share)
    assert int((found > 0).sum()) == min(budget, sum(counted))


def test_the_published_split_of_visionzip() -> None:
    scores, counted = torch.rand(1, 576), torch.ones(1, 576, dtype=torch.bool)
    for budget, contextual in ((64, 10), (128, 20), (192, 30)):
        found = spread_tokens(scores, counted, torch.tensor([budget]), 10 / 64)
        assert (int((found == 2).sum()), int((found == 1).sum())) == (budget - contextual, contextual)


def test_opcheck() -> None:
    arguments = (torch.rand(2, 17), torch.rand(2, 17) > 0.3, torch.tensor([5, 3]), 0.5)
    torch.library.opcheck(spread_tokens, arguments)


def test_refusals() -> None:
    scores, counted, budget = torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool), torch.tensor([2, 2])
    with pytest.raises(KernelError, match="scores is f64"):
        spread_tokens(scores.double(), counted, budget, 0.5)
    with pytest.raises(KernelError, match="budget is i32"):
        spread_tokens(scores, counted, budget.int(), 0.5)
    with pytest.raises(KernelError, match=r"share is 1\.5"):
        spread_tokens(scores, counted, budget, 1.5)


class Spread(torch.nn.Module):
    """Tokens above 0 count; a third of them is kept."""

    def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        counted = scores > 0
        return tuple(spread_tokens(scores, counted, counted.sum(1) // 3, share) for share in (0.0, 0.15625, 0.75))


def test_onnx_marks_the_same_tokens(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.spread_tokens.onnx import spread_tokens as translation

    exported = export_onnx(Spread(), [torch.randn(2, 20)], {OVERLOAD: translation})
    assert not any("::" in each for each in exported.operators)
    for batch, length in ((1, 6), (3, 17), (2, 257)):
        for levels in (1, 3, 1_000_000):
            scores = torch.randint(-1, levels, (batch, length)).float()
            assert all(map(torch.equal, exported(scores), Spread()(scores)))
