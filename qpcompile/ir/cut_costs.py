"""What it costs to cut, and the schedule with the least cost for a mean number of visual tokens.

C[b][k] is the measured cost of a single cut in front of layer b to the share k of the visual tokens, for b = 0 .. L,
with C[L][k] the cost of no cut. Layer b's own part in it is what is saved by cutting one layer later:

    D[b][k] = C[b][k] - C[b + 1][k]

The cost of a schedule k_0 >= k_1 >= ... >= k_{L-1} is taken to be sum_b D[b][k_b]: exact for a single cut. The solver
minimises it under  sum_b k_b <= mean * L  and a limit on the number of cuts, by dynamic programming over layers.

Ours: QUOTA (arXiv 2604.17320, equations 2 to 4) shares a fixed drop by a softmax over a proxy instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qpcompile.errors import PlanError

Table = NDArray[np.float64]

# Shares of the solver's schedules: a finer grid than what is measured, in equal ratios.
FINE_LEVELS = 32
BUDGET_STEPS = 480


@dataclass(frozen=True)
class CutCosts:
    """costs: f64[L, K] of a cut in front of each layer to each of `levels` (ascending, all below 1); base: of none."""

    levels: tuple[float, ...]
    costs: Table
    base: float

    def by_layer(self, levels: Sequence[float]) -> Table:
        """D of the module's docstring at other shares, f64[L, len(levels)], interpolated over log share."""
        depth = self.costs.shape[0]
        whole = np.concatenate([self.costs, np.full((1, len(self.levels)), self.base)])
        # Noise aside, a weaker cut never costs more: halfway between the two nearest tables of which that is true. A
        # later cut may cost more, where its layer scores tokens worse.
        above = np.maximum.accumulate(whole[:, ::-1], axis=1)[:, ::-1]
        whole = (above + np.minimum.accumulate(whole, axis=1)) / 2
        known = np.log([*self.levels, 1.0])
        rows = [np.interp(np.log(levels), known, [*row, self.base]) for row in whole]
        return np.diff(np.array(rows), axis=0)[:depth] * -1


def solve_schedule(costs: CutCosts, mean: float, cuts: int) -> tuple[float, ...]:
    """The share of visual tokens that each layer sees: never increasing, mean at most `mean`, at most `cuts` drops."""
    depth = costs.costs.shape[0]
    unit = mean * depth / BUDGET_STEPS
    levels = _fine_levels(costs.levels[0], unit)
    if min(levels) > mean:
        raise PlanError(
            f"the smallest share that was measured is {costs.levels[0]:g}, a mean of {mean:g} was asked",
            where="tokens.cost_levels, tokens.keep",
            do="measure smaller shares, or keep more",
        )
    part = costs.by_layer(levels)
    prices = np.rint(np.array(levels) / unit).astype(int)
    chosen = _search(part, prices, cuts)
    return _spend([levels[index] for index in chosen], mean * depth)


def _spend(shares: Sequence[float], total: float) -> tuple[float, ...]:
    """The shares below 1 enlarged by one factor until they sum to `total`: what the grid of levels has left over."""
    values = np.array(shares)
    whole = values >= 1.0
    if whole.all():
        return tuple(shares)
    factor = max(1.0, (total - whole.sum()) / values[~whole].sum())
    return tuple(float(share) for share in np.where(whole, 1.0, np.minimum(values * factor, 1.0)))


def _fine_levels(lowest: float, unit: float) -> list[float]:
    """Shares from `lowest` to 1 in about equal ratios, each a multiple of `unit` (rounded down) but the largest."""
    raw = np.geomspace(lowest, 1.0, FINE_LEVELS)
    return sorted({max(1, int(share / unit + 1e-9)) * unit for share in raw[:-1]} | {1.0})


def _search(part: Table, prices: NDArray[np.int64], cuts: int) -> list[int]:
    """part: f64[L, K], prices: i64[K] in budget steps -> one level index per layer, by exact dynamic programming.

    best[c, k, m]: the least cost of the layers so far with c cuts made, the current level k, and m steps spent.
    """
    depth, count = part.shape
    room = BUDGET_STEPS + 1
    best = np.full((cuts + 1, count, room), np.inf)
    # Before layer 0 the level is 1, the last of the list, at no price.
    best[0, count - 1, 0] = 0.0
    came: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
    for layer in range(depth):
        # A cut comes from the cheapest higher level with one cut fewer.
        higher = np.full_like(best, np.inf)
        source = np.zeros(best.shape, dtype=np.int64)
        for level in range(count - 2, -1, -1):
            take = best[:-1, level + 1] <= higher[1:, level + 1]
            higher[1:, level] = np.where(take, best[:-1, level + 1], higher[1:, level + 1])
            source[1:, level] = np.where(take, level + 1, source[1:, level + 1])
        is_cut = higher < best
        stayed = np.where(is_cut, higher, best)
        following = np.full_like(best, np.inf)
        for level in range(count):
            price = int(prices[level])
            if price < room:
                following[:, level, price:] = stayed[:, level, : room - price] + part[layer, level]
        came.append((source, is_cut))
        best = following
    return _walk_back(best, came, prices)


def _walk_back(
    best: Table, came: list[tuple[NDArray[np.int64], NDArray[np.bool_]]], prices: NDArray[np.int64]
) -> list[int]:
    cut, level, spent = (int(index) for index in np.unravel_index(np.argmin(best), best.shape))
    chosen = []
    for source, is_cut in reversed(came):
        chosen.append(level)
        spent -= int(prices[level])
        if is_cut[cut, level, spent]:
            level, cut = int(source[cut, level, spent]), cut - 1
    return chosen[::-1]
