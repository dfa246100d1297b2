"""Confidence intervals of differences between rows: the paired bootstrap over questions.

Both rows answered the same questions. Questions are resampled with replacement, together with both rows' marks, and the
statistic is recomputed; the middle 95 % of many resamples is the interval. If a row represents several seeds, its mark
of a question is the mean over the seeds: the interval covers the questions, and the spread over seeds is reported
separately.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Marks = Sequence[float] | NDArray[np.float64]
DRAWS = 10_000
_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.high < 0


def difference(first: Marks, second: Marks, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean mark of `first` minus that of `second`; marks in [0, 1], one per question, in the same order."""
    return _interval(lambda one, two: one - two, first, second, draws, seed)


def retention(row: Marks, full: Marks, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean mark of `row` over that of `full` precision; `full` has at least one right answer."""
    return _interval(lambda one, two: one / np.maximum(two, 1e-12), row, full, draws, seed)


def _interval(
    statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    first: Marks,
    second: Marks,
    draws: int,
    seed: int,
) -> Interval:
    pair = np.stack([np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)], axis=1)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            pair[generator.integers(len(pair), size=(min(_AT_ONCE, draws - done), len(pair)))].mean(axis=1)
            for done in range(0, draws, _AT_ONCE)
        ]
    )
    values = statistic(means[:, 0], means[:, 1])
    whole = pair.mean(axis=0)
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(statistic(whole[:1], whole[1:])[0]), float(low), float(high))
