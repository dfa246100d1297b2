"""Candidate schedules: their mean, their order, and their shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpcompile.errors import PlanError
from qpcompile.pruning.schedules import HEADS, PLACES, drops_of, flat, steps, two_steps


@given(st.floats(0.02, 0.99), st.integers(2, 80), st.integers(60, 3000))
def test_every_schedule_has_the_mean_and_never_rises(mean: float, depth: int, tokens: int) -> None:
    found = [flat(mean, depth, tokens), *two_steps(mean, depth, tokens)]
    for head in HEADS:
        made = steps(mean, depth, tokens, head)
        assert len(made) == len(set(made)) <= PLACES
        found += made
    for shares in found:
        assert len(shares) == depth and list(shares) == sorted(shares, reverse=True)
        counts = [share * tokens for share in shares]
        assert counts == pytest.approx([round(count) for count in counts])
        assert sum(counts) <= mean * depth * tokens + 1e-6 and max(shares) <= 1


@given(st.floats(0.02, 0.99), st.integers(2, 80), st.integers(60, 3000))
def test_the_last_layer_that_may_see_all_tokens_is_tried(mean: float, depth: int, tokens: int) -> None:
    whole = max((sum(share == 1 for share in shares) for shares in steps(mean, depth, tokens, 1.0)), default=0)
    assert whole == min(depth - 1, int(mean * depth + 1e-9)) or (whole, mean * depth < 1) == (0, True)


def test_by_hand() -> None:
    # 100 tokens in 4 layers, 120 in all.
    assert flat(0.3, 4, 100) == (0.3,) * 4
    # 100 in the first layer leave 20 for three: 6 each, and a remainder of two.
    assert steps(0.3, 4, 100, 1.0) == [(1.0, 0.06, 0.06, 0.06)]
    # 75 leave 45: 15 for each of three layers. 50 leave 70: 23 each and one more; twice, 20: 10 each.
    assert steps(0.3, 4, 100, 0.75) == [(0.75, 0.15, 0.15, 0.15)]
    assert steps(0.3, 4, 100, 0.5) == [(0.51, 0.23, 0.23, 0.23), (0.5, 0.5, 0.1, 0.1)]
    # All tokens for as long as possible, and then none.
    assert steps(0.5, 4, 10, 1.0) == [(1.0, 0.3, 0.3, 0.3), (1.0, 1.0, 0.0, 0.0)]
    # 160 in all: after 100 in the first layer, 50 leave 10 for two layers.
    assert (1.0, 0.5, 0.05, 0.05) in two_steps(0.4, 4, 100)


@given(st.floats(0.02, 0.99), st.integers(2, 80), st.integers(60, 3000), st.integers(2, 6))
def test_shares_fall_after_layers_that_can_score_only(mean: float, depth: int, tokens: int, every: int) -> None:
    scoring = range(every - 1, depth, every)
    found = two_steps(mean, depth, tokens, scoring)
    for head in HEADS:
        assert steps(mean, depth, tokens, head, range(depth)) == steps(mean, depth, tokens, head)
        found += steps(mean, depth, tokens, head, scoring)
    assert two_steps(mean, depth, tokens, range(depth)) == two_steps(mean, depth, tokens)
    assert {layer for shares in found for layer, _ in drops_of(shares)} <= {-1, *scoring}
    assert found or mean * depth < every
    assert steps(mean, depth, tokens, 1.0, []) == two_steps(mean, depth, tokens, []) == []


def test_drops_of_a_schedule() -> None:
    assert drops_of((1.0, 1.0, 0.4, 0.1)) == ((1, 0.4), (2, 0.1))
    assert drops_of((0.5, 0.5, 0.5)) == ((-1, 0.5),)


@pytest.mark.parametrize(("mean", "depth"), [(1.0, 8), (0.001, 8), (0.5, 1)])
def test_nothing_to_choose(mean: float, depth: int) -> None:
    with pytest.raises(PlanError, match="leaves nothing to choose"):
        flat(mean, depth, 144)
