"""The solver of token schedules against brute force, and its invariants."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.errors import PlanError
from qpcompile.ir.cut_costs import CutCosts, solve_schedule


def costs_of(part: np.ndarray, levels: tuple[float, ...], base: float = 0.0) -> CutCosts:
    """Costs whose share of each layer is `part`."""
    return CutCosts(levels, np.cumsum(part[::-1], axis=0)[::-1] + base, base)


def test_a_layer_that_needs_everything_gets_everything() -> None:
    # All of the picture is read by layer 0.
    part = np.array([[5.0, 4.0, 3.0], [0.01, 0.005, 0.0], [0.01, 0.005, 0.0], [0.01, 0.005, 0.0]])
    schedule = solve_schedule(costs_of(part, (0.05, 0.1, 0.5)), mean=0.3, cuts=3)
    assert schedule[0] == 1.0
    assert max(schedule[1:]) < 0.1 and sum(schedule) <= 4 * 0.3 + 1e-9


def test_equal_layers_share_equally() -> None:
    part = np.tile([[0.8, 0.4, 0.1]], (6, 1))
    schedule = solve_schedule(costs_of(part, (0.1, 0.25, 0.5)), mean=0.5, cuts=1)
    assert schedule[0] == pytest.approx(0.5, rel=0.1)
    assert sum(schedule) / 6 == pytest.approx(0.5, rel=0.05)


def test_a_weaker_cut_never_costs_more() -> None:
    costs = CutCosts((0.1, 0.5), np.array([[0.2, 0.3], [0.25, 0.01], [0.05, 0.02]]), 0.02)
    part = costs.by_layer([0.1, 0.2, 0.5, 1.0])
    # 0.2 and 0.3 disagree with the order: both become 0.25.
    assert part.sum(0) == pytest.approx([0.23, 0.23, 0.23, 0])
    assert part[:, 0] == pytest.approx([0.0, 0.2, 0.03])


def test_a_layer_that_scores_badly_is_passed_over() -> None:
    # Cutting in front of layer 2 costs more than in front of layer 1: its scores are worse.
    costs = CutCosts((0.1, 0.5), np.array([[9.0, 5.0], [0.1, 0.05], [0.8, 0.4], [0.3, 0.1]]), 0.0)
    assert solve_schedule(costs, mean=0.4, cuts=3)[:2] == pytest.approx((1.0, 0.2), abs=0.1)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 4), st.floats(0.15, 0.9), st.integers(1, 3), st.integers(0, 10_000))
def test_never_worse_than_any_coarse_schedule(depth: int, mean: float, cuts: int, seed: int) -> None:
    """Brute force over monotone schedules on the measured levels: those it finds are feasible for the solver too,
    up to the width of a budget step."""
    levels = (0.1, 0.3, 0.6)
    part = np.sort(np.random.default_rng(seed).random((depth, 3)), axis=1)[:, ::-1]
    costs = costs_of(part, levels)
    schedule = solve_schedule(costs, mean, cuts)
    assert sum(schedule) <= depth * mean + 1e-9 and list(schedule) == sorted(schedule, reverse=True)
    assert len({1.0, *schedule}) <= cuts + 1

    def cost(shares: tuple[float, ...]) -> float:
        table = costs.by_layer(sorted({*shares}))
        return sum(table[layer, sorted({*shares}).index(share)] for layer, share in enumerate(shares))

    feasible = [
        shares
        for shares in itertools.product((*levels, 1.0), repeat=depth)
        if list(shares) == sorted(shares, reverse=True)
        and sum(shares) <= depth * mean * 0.95
        and len({1.0, *shares}) <= cuts + 1
    ]
    assert all(cost(schedule) <= cost(shares) + 0.06 * part.sum() for shares in feasible)


def test_a_mean_below_what_was_measured_is_refused() -> None:
    with pytest.raises(PlanError, match=r"smallest share that was measured is 0\.2"):
        solve_schedule(CutCosts((0.2, 0.5), np.ones((3, 2)), 0.0), mean=0.1, cuts=2)
