"""Split a row's budget between top-scoring tokens and tokens evenly spaced among the rest.

    c = floor(budget * share + 1/2)     spread over the R = n - d tokens that are not among the best
    d = budget - c                     best
    2 for the d highest scores (ties to the lower index)
    1 for tokens number floor(j R / c), j = 0 .. c - 1, of the others in order
    0 for everything else

n tokens of a row are counted; a budget above n is n.

Source: VisionZip (arXiv 2412.04467), section 3.2, and LLaVA-PruMerge (arXiv 2403.15388), section 3.3: both take the
best tokens and a uniform sample; rounding and the exact spacing are ours.
"""

import torch
from torch import Tensor


def spread_tokens(scores: Tensor, counted: Tensor, budget: Tensor, share: float) -> Tensor:
    """scores: f32[B, S], counted: bool[B, S], budget: i64[B], share: 0..1 -> f32[B, S]."""
    total = counted.sum(dim=1, keepdim=True)
    keep = torch.minimum(budget[:, None], total)
    spread = torch.floor(keep.double() * share + 0.5).long()
    order = torch.where(counted, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    best = counted & (rank < keep - spread)
    rest = counted & ~best
    place = (rest.cumsum(dim=1) - 1).clamp(min=0)
    others = (total - (keep - spread)).clamp(min=1)
    spaced = rest & (ceil_div((place + 1) * spread, others) > ceil_div(place * spread, others))
    return 2 * best.float() + spaced.float()


def ceil_div(value: Tensor, divisor: Tensor) -> Tensor:
    """ceil(value / divisor) for value >= 0 and divisor > 0."""
    return (value + divisor - 1) // divisor
