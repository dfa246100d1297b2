"""Keep a few pivots and the tokens least similar to them: dropped tokens have a near-duplicate among the kept ones.

    pivots:   the P_v visual tokens and the P_t text tokens after the picture whose keys have the largest L1 norm
    then pivot by pivot, visual ones first: the free visual tokens of least cosine with it, ties by lower index

A row's budget of T visual tokens is its own min(P_v, T) visual pivots and T' others, of which each of the row's n
pivots takes T' // n, the first T' % n one more. Score: 2 for visual pivots, 1 for the tokens that pivots took, 0
otherwise.

Norms and cosines are float64 and compared in float32, so that equal tokens tie under any summation order.

Source: DART (arXiv 2502.11494), section 4, and its code for the norm and the order; the split of a T' not divisible by
n is ours.
"""

import torch
from torch import Tensor

from qpcompile.kernels.dpp_select.reference import pick_row, unit_rows


def pivot_tokens(
    hidden: Tensor, keys: Tensor, visual: Tensor, valid: Tensor, budget: Tensor, visual_pivots: int, text_pivots: int
) -> Tensor:
    """hidden: f[B, S, C], keys: f[B, H, S, D], visual, valid: bool[B, S], budget: i64[B] -> f32[B, S]."""
    counted = visual & valid
    text = valid & ~visual & (counted.cumsum(1) > 0)
    size = keys.double().abs().sum((1, 3)).float()
    own = torch.minimum(budget, counted.sum(1))
    first, second = own.clamp(max=visual_pivots), text.sum(1).clamp(max=text_pivots)
    left, pivots = own - first, (first + second).clamp(min=1)
    # At most as many pivots as tokens.
    visual_slots, text_slots = (range(min(pivots, size.shape[1])) for pivots in (visual_pivots, text_pivots))
    ordinals = [(_nth(size, counted, slot), slot, slot < first) for slot in visual_slots]
    ordinals += [(_nth(size, text, slot), first + slot, slot < second) for slot in text_slots]

    unit = unit_rows(hidden)
    score = torch.zeros_like(size)
    for index, _, exists in ordinals[: len(visual_slots)]:
        score = score.scatter(1, index, torch.where(exists[:, None], 2.0, score.gather(1, index)))
    for index, ordinal, exists in ordinals:
        share = torch.where(exists, left // pivots + (ordinal < left % pivots), 0)
        cosine = (unit @ pick_row(unit, index)).squeeze(2).float()
        free = counted & (score == 0)
        rank = torch.where(free, cosine, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        score = torch.where(free & (rank < share[:, None]), 1.0, score)
    return score


def _nth(size: Tensor, among: Tensor, slot: int) -> Tensor:
    """i64[B, 1]: the index of entry number `slot` in descending order, restricted to `among`."""
    order = torch.where(among, size, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order[:, slot, None]
