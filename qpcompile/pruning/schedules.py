"""Candidate schedules of the schedule search, all with the same mean.

A schedule is the share of visual tokens that each decoder layer sees, k_0 >= k_1 >= ... >= k_{L-1}, mean given.

    flat     k, k, k, k, ...       one cut before the decoder
    step     a, .., a, k, .., k    share a for the first b layers, a = 1 or a cut before the decoder

Shares are multiples of one token on a prompt with `tokens` of them, k is rounded down and the remainder goes to a: no
schedule keeps more than the mean on such a prompt. For deep decoders b is sampled, more densely among early layers.
"""

from __future__ import annotations

from math import floor

import numpy as np

from qpcompile.errors import PlanError
from qpcompile.ir.measurements import Measurement

Shares = tuple[float, ...]
SCHEDULE: Measurement[Shares] = Measurement("schedule")

HEADS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
PLACES = 8


def schedules(mean: float, depth: int, tokens: int) -> list[Shares]:
    """The candidate schedules, each with this mean over `depth` layers; PlanError if only all tokens would do."""
    budget = floor(mean * depth * tokens + 1e-9)
    if budget < depth or mean >= 1 or depth < 2:
        raise PlanError(
            f"a mean of {mean:g} of {tokens} visual tokens over {depth} layers leaves nothing to choose",
            where="tokens.keep",
            do="ask for a mean below 1 that leaves a token for every layer",
        )
    counts = [(budget // depth,) * depth]
    for head in HEADS:
        for border in _places(depth):
            counts += _steps(floor(head * tokens), border, budget, depth, tokens)
    return [tuple(count / tokens for count in found) for found in dict.fromkeys(counts)]


def cut_layers_of(shares: Shares) -> tuple[tuple[int, float], ...]:
    """(last layer that sees more, share after it) of each drop; -1 is the decoder's input."""
    before = (1.0, *shares[:-1])
    return tuple(
        (layer - 1, share) for layer, (last, share) in enumerate(zip(before, shares, strict=True)) if share < last
    )


def _places(depth: int) -> list[int]:
    """Layers where a share may change, from 1 to depth - 1."""
    return sorted({int(place) for place in np.rint(np.geomspace(1, depth - 1, min(PLACES, depth - 1)))})


def _steps(head: int, border: int, budget: int, depth: int, tokens: int) -> list[tuple[int, ...]]:
    """The step in tokens, `head` or slightly more for the first `border` layers; empty if no token is left after."""
    share, spare = divmod(budget - head * border, depth - border)
    if not 1 <= share < head:
        return []
    first = min(tokens, head + spare // border)
    return [(first,) * border + (share,) * (depth - border)]
