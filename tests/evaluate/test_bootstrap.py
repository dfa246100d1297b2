"""Paired bootstrap: known data, pairing, seeds; and the published tables' own averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.evaluate.run.bootstrap import difference, retention

# "QUOTA" (arXiv 2604.17320), tables 3 and 4: MMB, MME, GQA, POPE, SEED, SQA of full precision and of each row.
FULL = (62.37, 1781.12, 60.45, 85.89, 64.01, 66.09)
QUOTA_30 = (57.47, 1688.72, 57.97, 84.83, 62.10, 62.96)
PUBLISHED = {
    "quantized only": ((56.10, 1749.30, 59.25, 84.98, 62.73, 63.16), 96.45),
    "pruned only": ((60.82, 1752.15, 58.46, 85.10, 62.13, 64.85), 97.81),
    "quantized, then pruned": ((56.70, 1652.74, 56.82, 84.28, 61.35, 62.22), 94.30),
    "pruned, then quantized": ((56.44, 1654.98, 56.86, 84.54, 60.50, 63.21), 94.34),
    "joint": (QUOTA_30, 95.65),
}


def mean_retention(row: tuple[float, ...], full: tuple[float, ...]) -> float:
    """As the paper averages: the mean of each benchmark's retention, in %."""
    found = [retention([value], [base], draws=1).estimate for value, base in zip(row, full, strict=True)]
    return 100 * sum(found) / len(found)


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_3_is_the_mean_of_retentions(name: str) -> None:
    row, published = PUBLISHED[name]
    assert mean_retention(row, FULL) == pytest.approx(published, abs=0.006)


def test_table_4_leaves_one_benchmark_out() -> None:
    seed = 4
    row, full = (values[:seed] + values[seed + 1 :] for values in (QUOTA_30, FULL))
    assert mean_retention(row, full) == pytest.approx(95.38, abs=0.006)


def test_equal_rows_differ_by_nothing() -> None:
    marks = [1.0, 0.0, 1.0, 1.0]
    found = difference(marks, marks)
    assert (found.estimate, found.low, found.high) == (0, 0, 0)
    assert not found.above_zero and not found.below_zero
    assert retention(marks, marks).low == 1 == retention(marks, marks).high


def test_interval_is_the_normal_one_on_many_questions() -> None:
    generator = np.random.default_rng(1)
    first, second = (generator.random(2000) < share for share in (0.9, 0.8))
    found = difference(first.astype(float), second.astype(float))
    gap = first.astype(float) - second
    half = 1.96 * gap.std() / math.sqrt(len(gap))
    assert found.estimate == pytest.approx(gap.mean())
    assert (found.low, found.high) == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.002)
    assert found.above_zero


def test_pairing_narrows_the_interval() -> None:
    """The interval is narrow for rows that fail on the same questions, and wide for independent ones."""
    first = np.repeat([1.0, 0.0], 500)
    same, shuffled = first.copy(), np.random.default_rng(0).permutation(first)
    same[:20] = 0
    shuffled[np.flatnonzero(shuffled)[:20]] = 0
    close, far = difference(first, same), difference(first, shuffled)
    assert close.estimate == pytest.approx(far.estimate)
    assert close.above_zero and not far.above_zero


def test_two_calls_agree_and_seeds_differ() -> None:
    first, second = np.random.default_rng(2).random((2, 997))
    assert difference(first, second) == difference(first, second)
    assert difference(first, second) != difference(first, second, seed=1)


def test_means_over_seeds_count_as_marks() -> None:
    found = retention([0.5, 0.5], [1.0, 1.0])
    assert (found.estimate, found.low, found.high) == (0.5, 0.5, 0.5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_estimate_lies_in_the_interval(pairs: list[tuple[bool, bool]]) -> None:
    first, second = ([float(value) for value in column] for column in zip(*pairs, strict=True))
    found = difference(first, second, draws=2000)
    mirrored = difference(second, first, draws=2000)
    assert -1 <= found.low <= found.estimate + 0.1 and found.estimate - 0.1 <= found.high <= 1
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
