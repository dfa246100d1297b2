"""Distribute bits over sites under a budget: which sites take 8 bits instead of 4.

    max over sets R of  sum over R of (error with 4 - error with 8)
    with                sum over R of size * 4 <= (mean - 4) * total size

Greedily by the gain per element, largest first; a site that no longer fits is skipped. A larger budget never gives a
larger error: the first site that only the larger budget takes gains more per element than all that fit in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

LOW, HIGH = 4, 8


@dataclass(frozen=True)
class Site:
    """A candidate: the elements that its bits are paid for, and its error with LOW and with HIGH bits."""

    name: str
    size: int
    low: float
    high: float

    @property
    def gain(self) -> float:
        """The error that HIGH bits save."""
        return self.low - self.high


def raised(sites: Sequence[Site], mean: float) -> set[str]:
    """Names of the sites that take HIGH bits, for a mean of at most `mean` bits over all elements."""
    left = int((Fraction(mean) - LOW) * sum(site.size for site in sites) / (HIGH - LOW))
    chosen: set[str] = set()
    for site in sorted(sites, key=lambda site: site.gain / site.size, reverse=True):
        if site.gain > 0 and site.size <= left:
            chosen.add(site.name)
            left -= site.size
    return chosen
