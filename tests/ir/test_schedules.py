"""Schedules to try: their mean, their order, and what they look like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpcompile.errors import PlanError
from qpcompile.ir.schedules import SMALLEST, cut_layers_of, schedules


@given(st.floats(0.02, 0.99), st.integers(2, 80))
def test_every_schedule_has_the_mean_and_never_rises(mean: float, depth: int) -> None:
    found = schedules(mean, depth)
    assert len(found) == len(set(found)) and len(found) <= 4 * 8 * 2 + 1
    for shares in found:
        assert len(shares) == depth and sum(shares) / depth == pytest.approx(mean)
        assert list(shares) == sorted(shares, reverse=True)
        assert max(shares) <= 1 and min(shares) >= SMALLEST


def test_by_hand() -> None:
    found = schedules(0.3, 4)
    assert (0.3,) * 4 in found
    assert any(shares == pytest.approx((1.0, 0.2 / 3, 0.2 / 3, 0.2 / 3)) for shares in found)
    # 0.7 for one layer leaves 0.5 for three: two at 0.5 / 2.25, one at a quarter of that.
    assert any(shares == pytest.approx((0.7, 0.2222, 0.2222, 0.0556), abs=1e-4) for shares in found)
    # Two layers with everything are more than the budget.
    assert not any(shares[:2] == (1.0, 1.0) for shares in found)


def test_drops_of_a_schedule() -> None:
    assert cut_layers_of((1.0, 1.0, 0.4, 0.1)) == ((1, 0.4), (2, 0.1))
    assert cut_layers_of((0.5, 0.5, 0.5)) == ((-1, 0.5),)


@pytest.mark.parametrize(("mean", "depth"), [(1.0, 8), (0.001, 8), (0.5, 1)])
def test_nothing_to_choose(mean: float, depth: int) -> None:
    with pytest.raises(PlanError, match="leaves nothing to choose"):
        schedules(mean, depth)
