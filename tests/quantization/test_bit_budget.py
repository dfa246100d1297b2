"""Bits under a budget: never more than asked, and a larger budget never gives a larger error."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpcompile.quantization.bit_budget import HIGH, LOW, Site, raised

ERRORS = st.floats(0, 10, allow_subnormal=False)
SITES = st.lists(st.tuples(st.integers(1, 1000), ERRORS, ERRORS), min_size=1, max_size=12).map(
    lambda rows: [Site(str(place), *row) for place, row in enumerate(rows)]
)
MEANS = st.floats(LOW, HIGH)


def error(sites: list[Site], chosen: set[str]) -> float:
    return sum(site.high if site.name in chosen else site.low for site in sites)


@given(SITES, MEANS)
def test_the_mean_is_at_most_what_was_asked(sites: list[Site], mean: float) -> None:
    chosen = raised(sites, mean)
    bits = sum(site.size * (HIGH if site.name in chosen else LOW) for site in sites)
    assert bits <= mean * sum(site.size for site in sites) * (1 + 1e-12)


@given(SITES, MEANS, MEANS)
def test_more_bits_never_give_more_error(sites: list[Site], one: float, other: float) -> None:
    less, more = (error(sites, raised(sites, mean)) for mean in sorted((one, other)))
    assert more <= less + 1e-9


@given(SITES)
def test_the_ends(sites: list[Site]) -> None:
    assert raised(sites, LOW) == set()
    assert raised(sites, HIGH) == {site.name for site in sites if site.gain > 0}


def test_a_site_that_does_not_fit_is_skipped() -> None:
    """The large site saves most per weight, but half of the weights are all that may be raised."""
    sites = [Site("large", 6, 60, 0), Site("small", 2, 10, 0), Site("other", 2, 8, 0)]
    assert raised(sites, 6) == {"small", "other"}
    assert raised(sites, 6.4) == {"large"}
