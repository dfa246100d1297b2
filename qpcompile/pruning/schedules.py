"""Candidate schedules of the search for scores and schedules, all with the same mean.

A schedule is the share of visual tokens that each decoder layer sees, k_0 >= k_1 >= ... >= k_{L-1}, mean given.

    flat        k, k, k, k, ...            one cut before the decoder
    step        a, .., a, k, .., k         share a for the first b layers, a of HEADS: below 1, a cut before the decoder
    two steps   1, .., 1, a, .., a, k, ..  all tokens for the first b layers, share a for some more

Shares are multiples of one token on a prompt with `tokens` of them, k is rounded down and the remainder goes to a: no
schedule keeps more than the mean on such a prompt. The last b for each a is among them, with 0 tokens after it if none
is left: a model that reads its picture late needs them as late as the mean allows. Other b are sampled, more densely
among early layers.
"""

from __future__ import annotations

from collections.abc import Collection
from math import floor

import numpy as np

from qpcompile.errors import PlanError

Shares = tuple[float, ...]

HEADS = (1.0, 0.75, 0.5, 0.25)
MIDDLES = (0.5, 0.25)
PLACES = 5


def flat(mean: float, depth: int, tokens: int) -> Shares:
    """One share in all layers; PlanError if only all tokens or none would do."""
    return (_budget(mean, depth, tokens) // depth / tokens,) * depth


def steps(mean: float, depth: int, tokens: int, head: float, scoring: Collection[int] | None = None) -> list[Shares]:
    """`head`, or slightly more, for the first layers, and one share for the others.

    scoring: the layers after which a share may fall, None for all: those that can score tokens.
    """
    budget, first = _budget(mean, depth, tokens), floor(head * tokens)
    found = [_step(first, border, budget, depth, tokens) for border in _borders(first, budget, depth, 0, scoring)]
    return [tuple(count / tokens for count in counts) for counts in dict.fromkeys(found) if counts]


def two_steps(mean: float, depth: int, tokens: int, scoring: Collection[int] | None = None) -> list[Shares]:
    """All tokens for the first layers, then a share of MIDDLES, then less. scoring: as of `steps`."""
    budget = _budget(mean, depth, tokens)
    found: list[tuple[int, ...]] = []
    for middle in MIDDLES:
        share = floor(middle * tokens)
        for border in _borders(tokens, budget, depth, 0, scoring):
            left, layers = budget - tokens * border, depth - border
            tails = (
                _step(share, second, left, layers, share) for second in _borders(share, left, layers, border, scoring)
            )
            found += [(tokens,) * border + tail for tail in tails if tail]
    return [tuple(count / tokens for count in counts) for counts in dict.fromkeys(found)]


def drops_of(shares: Shares) -> tuple[tuple[int, float], ...]:
    """(last layer that sees more, share after it) of each drop; -1 is the decoder's input."""
    before = (1.0, *shares[:-1])
    return tuple(
        (layer - 1, share) for layer, (last, share) in enumerate(zip(before, shares, strict=True)) if share < last
    )


def _budget(mean: float, depth: int, tokens: int) -> int:
    """Visual tokens of all layers together."""
    budget = floor(mean * depth * tokens + 1e-9)
    if budget < depth or mean >= 1 or depth < 2:
        raise PlanError(
            f"a mean of {mean:g} of {tokens} visual tokens over {depth} layers leaves nothing to choose",
            where="tokens.keep",
            do="ask for a mean below 1 that leaves a token for every layer",
        )
    return budget


def _borders(head: int, budget: int, depth: int, before: int, scoring: Collection[int] | None) -> list[int]:
    """Layers where a share may fall below `head`, from 1 to the last one that the budget allows; `before` layers come
    before the first.
    """
    last = min(depth - 1, budget // max(head, 1))
    allowed = [border for border in range(1, last + 1) if scoring is None or before + border - 1 in scoring]
    if not allowed:
        return []
    places = np.rint(np.geomspace(1, last, min(PLACES, last))).tolist()
    return sorted({min(allowed, key=lambda border: abs(border - place)) for place in places})


def _step(head: int, border: int, budget: int, depth: int, most: int) -> tuple[int, ...]:
    """The step in tokens, `head` or slightly more for the first `border` layers; empty if it does not fall."""
    share, spare = divmod(budget - head * border, depth - border)
    if not 0 <= share < head:
        return ()
    first = min(most, head + spare // border)
    return (first,) * border + (share,) * (depth - border)
