"""Schedules with one mean: the shapes that a search tries.

A schedule is the share of visual tokens that each decoder layer sees, k_0 >= k_1 >= ... >= k_{L-1}, mean given.

    flat     k, k, k, k, ...                 one cut in front of the decoder
    step     a, .., a, k, .., k              share a for the first b layers, a = 1 or a cut in front of the decoder
    fade     a, .., a, k, .., k, k/4, ..     a step whose second half of the rest fades

k follows from the mean. For deep decoders b runs over some layers, denser at the front.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qpcompile.errors import PlanError

Shares = tuple[float, ...]

HEADS = (1.0, 0.85, 0.7, 0.5)
PLACES = 8
FADE = 4
SMALLEST = 0.01


def schedules(mean: float, depth: int) -> list[Shares]:
    """The schedules to try, each with this mean over `depth` layers; PlanError where there is none but all tokens."""
    if not SMALLEST <= mean < 1 or depth < 2:
        raise PlanError(
            f"a mean of {mean:g} over {depth} layers leaves nothing to choose",
            where="tokens.keep",
            do=f"ask for a mean from {SMALLEST:g} to below 1",
        )
    found = [(mean,) * depth]
    for head in HEADS:
        for border in _places(depth):
            found += _behind(head, border, mean, depth)
    return list(dict.fromkeys(found))


def cut_layers_of(shares: Shares) -> tuple[tuple[int, float], ...]:
    """(last layer that sees more, share behind it) of each drop; -1 is the decoder's input."""
    before = (1.0, *shares[:-1])
    return tuple(
        (layer - 1, share) for layer, (last, share) in enumerate(zip(before, shares, strict=True)) if share < last
    )


def _places(depth: int) -> list[int]:
    """Layers where a share may change, from 1 to depth - 1."""
    return sorted({int(place) for place in np.rint(np.geomspace(1, depth - 1, min(PLACES, depth - 1)))})


def _behind(head: float, border: int, mean: float, depth: int) -> Iterator[Shares]:
    """Step and fade with `head` for the first `border` layers."""
    left, layers = mean * depth - head * border, depth - border
    late = layers // 2
    for fade in (1, FADE):
        if fade > 1 and not late:
            continue
        share = left / (layers - late + late / fade)
        if share / fade >= SMALLEST and share < head:
            yield (head,) * border + (share,) * (layers - late) + (share / fade,) * late
