"""Candidate schedules: their mean, their order, and their shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpcompile.errors import PlanError
from qpcompile.pruning.schedules import cut_layers_of, schedules


@given(st.floats(0.02, 0.99), st.integers(2, 80), st.integers(60, 3000))
def test_every_schedule_has_the_mean_and_never_rises(mean: float, depth: int, tokens: int) -> None:
    found = schedules(mean, depth, tokens)
    assert len(found) == len(set(found)) and len(found) <= 6 * 8 + 1
    for shares in found:
        assert len(shares) == depth and list(shares) == sorted(shares, reverse=True)
        counts = [share * tokens for share in shares]
        assert counts == pytest.approx([round(count) for count in counts]) and round(counts[-1]) >= 1
        assert sum(counts) <= mean * depth * tokens + 1e-6 and max(shares) <= 1
    # All but the flat one miss the budget only if the first layers cannot take one more token each.
    assert all(sum(shares) * tokens > mean * depth * tokens - depth or shares[0] == 1 for shares in found)


def test_by_hand() -> None:
    # 100 tokens in 4 layers, 120 in all.
    found = schedules(0.3, 4, 100)
    assert (0.3,) * 4 in found
    # 100 in the first layer leave 20 for three: 6 each, and a remainder of two.
    assert (1.0, 0.06, 0.06, 0.06) in found
    # 70 leave 50: 16 for each of three layers, and two more for the first.
    assert (0.72, 0.16, 0.16, 0.16) in found
    # Two layers with all tokens exceed the budget.
    assert not any(shares[:2] == (1.0, 1.0) for shares in found)


def test_drops_of_a_schedule() -> None:
    assert cut_layers_of((1.0, 1.0, 0.4, 0.1)) == ((1, 0.4), (2, 0.1))
    assert cut_layers_of((0.5, 0.5, 0.5)) == ((-1, 0.5),)


@pytest.mark.parametrize(("mean", "depth"), [(1.0, 8), (0.001, 8), (0.5, 1)])
def test_nothing_to_choose(mean: float, depth: int) -> None:
    with pytest.raises(PlanError, match="leaves nothing to choose"):
        schedules(mean, depth, 144)
