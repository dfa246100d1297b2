"""The token budget against the paper's figures, derived vectors and its invariants."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.errors import PlanError
from qpcompile.pruning.budget import (
    candidate_layers,
    drop_shares,
    keep_ratios,
    normalize_sensitivity,
    ratio_fraction,
    relative_deviation,
    sensitivity,
    tokens_by_fraction,
    tokens_kept,
)

FIGURE_4 = (0.9, 0.35, 0.355, 0.30, 0.1)
SCHEDULES = {
    0.5: [539, 480, 421, 360, 288],
    0.4: [531, 461, 390, 317, 231],
    0.3: [524, 441, 359, 274, 173],
    0.2: [516, 422, 328, 231, 116],
    0.1: [508, 403, 297, 187, 58],
    0.05: [505, 393, 282, 166, 29],
}
# Read off figure 3 (32 layers); layers 0 and 1 are given the cosine of layer 2, which the figure does not label.
MASS = [0.05, 0.12, 0.74, 0.755, 0.67, 0.55, 0.52, *[0.45] * 5, *[0.35] * 20]
COSINE = [0.37, 0.37, 0.37, 0.355, 0.34, 0.325, 0.31, 0.30, 0.29, 0.29, *[0.285] * 6, *[0.35] * 13, 0.48, 0.50, 0.52]
IQR = [0.1 * mass for mass in MASS]

sensitivities = st.lists(st.floats(0, 1e6), min_size=1, max_size=12)
keeps = st.floats(0.01, 1.0)


def shares_and_ratios(
    values: Sequence[float], keep: float, temperature: float = 1.25
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Equations 2 to 4."""
    shares = drop_shares(normalize_sensitivity(values), temperature)
    return shares, keep_ratios(shares, keep)


def counts_of(ratios: Sequence[float], visual: int) -> list[int]:
    """The number of tokens that the graph keeps."""
    return [tokens_by_fraction(*ratio_fraction(ratio), visual) for ratio in ratios]


@pytest.mark.parametrize("keep", SCHEDULES)
def test_schedules_of_the_paper(keep: float) -> None:
    ratios = keep_ratios(drop_shares(FIGURE_4, 1.25), keep)
    assert [tokens_kept(ratio, 576) for ratio in ratios] == SCHEDULES[keep]
    assert [tokens_by_fraction(*ratio_fraction(ratio), 576) for ratio in ratios] == SCHEDULES[keep]


def test_equal_sensitivity_gives_equal_drops() -> None:
    shares, ratios = shares_and_ratios([0.07] * 5, keep=0.3)
    assert counts_of(ratios, 576) == [496, 415, 335, 254, 173]
    assert shares == pytest.approx([0.2] * 5)


def test_equations_by_hand() -> None:
    # P10 and P90 of 1..5 are 1.4 and 4.6; the middle maps to 0.5, the neighbours to 0.6/3.2 and 2.6/3.2.
    assert normalize_sensitivity([1, 2, 3, 4, 5]) == pytest.approx((0.1, 0.1875, 0.5, 0.8125, 0.9))
    smaller, larger = drop_shares([0.9, 0.1], 2.0)
    assert smaller == pytest.approx(1 / (1 + math.exp(0.4)))
    assert smaller + larger == pytest.approx(1)
    assert keep_ratios([0.25, 0.75], 0.2) == pytest.approx((0.8, 0.2))
    assert relative_deviation([[3.0, 4.0]], [[3.0, 0.0]]) == pytest.approx(4 / 3, rel=1e-6)
    assert relative_deviation([0.0], [0.0]) == 0
    assert sensitivity([[1, 9], [2, 7], [4, 8]]) == (2, 8)


def test_most_sensitive_layer_drops_least() -> None:
    shares, _ = shares_and_ratios([0.9, 0.35, 0.36, 0.30, 0.1], keep=0.3)
    assert shares.index(min(shares)) == 0 and shares.index(max(shares)) == 4
    assert max(shares) / min(shares) == pytest.approx(math.exp(0.8 / 1.25))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e9), min_size=5, max_size=5, unique=True))
def test_five_distinct_layers_reach_both_bounds(values: list[float]) -> None:
    normalized = normalize_sensitivity(values)
    assert min(normalized) == 0.1 and max(normalized) == 0.9
    assert normalized[values.index(min(values))] == 0.1 and normalized[values.index(max(values))] == 0.9


@settings(deadline=None)
@given(sensitivities, keeps, st.floats(0.05, 20), st.integers(1, 5000))
def test_schedule_invariants(values: list[float], keep: float, temperature: float, visual: int) -> None:
    shares, ratios = shares_and_ratios(values, keep, temperature)
    counts = counts_of(ratios, visual)
    assert sorted(ratios, reverse=True) == list(ratios)
    assert ratios[-1] == keep
    assert sorted(counts, reverse=True) == counts
    assert all(1 <= count <= visual for count in counts)
    assert sum(shares) == pytest.approx(1)


@settings(deadline=None)
@given(st.floats(0, 1e6), st.integers(1, 8), keeps)
def test_equal_values_give_equal_shares(value: float, layers: int, keep: float) -> None:
    shares, _ = shares_and_ratios([value] * layers, keep)
    assert len(set(shares)) == 1


@settings(deadline=None)
@given(sensitivities, st.integers(1, 100_000))
def test_keeping_everything_keeps_everything(values: list[float], visual: int) -> None:
    assert set(counts_of(shares_and_ratios(values, keep=1.0)[1], visual)) == {visual}


@settings(deadline=None)
@given(st.floats(1e-4, 1.0), st.integers(1, 100_000))
def test_integer_form_never_keeps_more_and_at_most_one_less(ratio: float, visual: int) -> None:
    by_float = tokens_kept(ratio, visual)
    by_integers = tokens_by_fraction(*ratio_fraction(ratio), visual)
    # A ratio within 1e-6 of a whole product is the one place where the float guard rounds down and integers do not.
    guarded = 0 < ratio * visual - math.floor(ratio * visual) <= 1e-6
    assert by_integers - guarded <= by_float <= by_integers + 1


@settings(deadline=None)
@given(st.integers(1, 1_000_000), st.integers(1, 100_000))
def test_stored_fraction_survives_a_round_trip(numerator: int, visual: int) -> None:
    assert ratio_fraction(numerator / 1_000_000) == (numerator, 1_000_000)
    assert 1 <= tokens_by_fraction(numerator, 1_000_000, visual) <= visual


@pytest.mark.parametrize(
    ("ratio", "visual", "kept"),
    [(0.5, 576, 288), (0.3, 10, 3), (2 / 3, 576, 384), (1 / 3, 3, 1), (0.29, 100, 29), (1e-9, 7, 1), (1.0, 5, 5)],
)
def test_whole_products_stay_whole(ratio: float, visual: int, kept: int) -> None:
    assert tokens_kept(ratio, visual) == tokens_by_fraction(*ratio_fraction(ratio), visual) == kept


def test_no_visual_token_keeps_none() -> None:
    assert tokens_kept(0.3, 0) == tokens_by_fraction(*ratio_fraction(0.3), 0) == 0


def test_candidates_of_figure_3() -> None:
    assert candidate_layers(MASS, IQR, COSINE).layers == (2, 3, 4, 5, 6)
    assert candidate_layers(MASS, IQR, COSINE, max_candidates=2).layers == (2, 3)


def test_unstable_first_layers_are_skipped() -> None:
    iqr = [*IQR[:2], 0.6 * MASS[2], *IQR[3:]]
    assert candidate_layers(MASS, iqr, COSINE).layers[0] == 3
    assert candidate_layers(MASS, iqr, COSINE, iqr_ceiling=0.7).layers[0] == 2


def test_a_weak_or_unstable_layer_ends_the_range() -> None:
    mass = [*MASS[:4], 0.01, *MASS[5:]]
    assert candidate_layers(mass, [*IQR[:4], 0.0, *IQR[5:]], COSINE).layers == (2, 3)
    assert candidate_layers(MASS, [*IQR[:5], 0.6 * MASS[5], *IQR[6:]], COSINE).layers == (2, 3, 4)


def test_run_ends_at_the_first_gap() -> None:
    cosine = [*COSINE[:4], 0.52, *COSINE[5:]]
    assert candidate_layers(MASS, IQR, cosine).layers == (2, 3)


def test_redundancy_is_a_share_of_the_range() -> None:
    assert candidate_layers([1] * 6, [0] * 6, [0.4] * 6, tail_fraction=0.0).layers == (0, 1, 2, 3, 4)
    assert candidate_layers([1] * 6, [0] * 6, [0.42, 0.44, 0.5, 0.49, 0.43, 0.4], tail_fraction=0.0).layers == (0, 1)
    assert candidate_layers([1] * 6, [0] * 6, [0.3, 0.3, 0.3, 0.9, 0.3, 0.3], tail_fraction=0.0).layers == (0, 1, 2)


def test_tail_is_never_cut() -> None:
    assert candidate_layers([1] * 8, [0] * 8, [0.3] * 8, tail_fraction=0.5).layers == (0, 1, 2, 3)
    assert candidate_layers([1] * 3, [0] * 3, [0.3] * 3).layers == (0, 1)
    assert candidate_layers([1] * 3, [0] * 3, [0.3] * 3, tail_fraction=0.0).layers == (0, 1, 2)


def test_conditions_are_waived_until_a_layer_is_left() -> None:
    """Layers 0 and 1 are weak, 2 is redundant, 3 is the tail: diversity is given up before concentration."""
    found = candidate_layers([0.1, 0.1, 1.0, 1.0], [0] * 4, [0.1, 0.2, 0.9, 0.3], tail_fraction=0.25)
    assert found.layers == (2,)
    assert found.waived == ("cosine_ceiling (cosine above 0.5) excluded layers [2]",)


def test_unstable_layers_are_taken_where_all_are() -> None:
    found = candidate_layers([1.0] * 4, [0.9] * 4, [0.1, 0.9, 0.1, 0.1], tail_fraction=0.25)
    assert found.layers == (0,)
    assert found.waived == ("iqr_ceiling (range above 0.5 x mass) excluded layers [0, 1, 2, 3]",)
    assert candidate_layers(MASS, IQR, COSINE).waived == ()


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=2, max_size=12))
def test_some_early_layer_is_always_found(profile: list[tuple[float, float, float]]) -> None:
    mass, spread, cosine = zip(*profile, strict=True)
    found = candidate_layers(mass, spread, cosine)
    assert found.layers and found.layers == tuple(range(found.layers[0], found.layers[-1] + 1))
    assert found.layers[-1] < len(profile) - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keep_ratios([1.0], 0.0), "keep is 0.0"),
        (lambda: keep_ratios([1.0], 1.01), "keep is 1.01"),
        (lambda: drop_shares([0.5], 0.0), "temperature is 0.0"),
        (lambda: drop_shares([0.5], math.inf), "temperature is inf"),
        (lambda: normalize_sensitivity([]), "no layer"),
        (lambda: normalize_sensitivity([1.0, math.nan]), "NaN"),
        (lambda: normalize_sensitivity([1.0], 90, 10), "lower number first"),
        (lambda: sensitivity(np.zeros((0, 3))), "at least one calibration sample"),
        (lambda: ratio_fraction(-0.1), "not from 0 to 1"),
        (lambda: candidate_layers([1.0], [0.0, 0.0], [0.0]), "1 masses, 2 ranges"),
        (lambda: candidate_layers([1.0] * 2, [0.0] * 2, [0.0] * 2, max_candidates=0), "at most 0"),
        (lambda: candidate_layers([1.0] * 2, [0.0] * 2, [0.0] * 2, tail_fraction=1.0), "last 2 of 2 layers"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call()
