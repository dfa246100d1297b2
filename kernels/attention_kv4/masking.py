"""What an attention mask means, once for every attention operator.

bool: True where a query may see a key. Float: added to the scores; an entry at or below -30000 forbids the key, which
takes in -inf and the smallest numbers of f16, bf16 and f32 that models write there. A query that may see no key gets
probability 0 everywhere, so that padding rows stay finite.
"""

import torch
from torch import Tensor

FORBIDDEN = -3e4


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """mask: bool or f[...] -> allowed: bool[...], and what to add to the scores: f32[...] or None."""
    if mask.dtype == torch.bool:
        return mask, None
    allowed = mask > FORBIDDEN
    return allowed, torch.where(allowed, mask.float(), 0.0)


def masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """scores: f[..., S] with the mask applied: forbidden keys are -inf."""
    if mask is None:
        return scores
    allowed, bias = split_mask(mask)
    return torch.where(allowed, scores if bias is None else scores + bias, -torch.inf)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """scores: f[..., Sq, S], mask as above -> probabilities f[..., Sq, S]; a row that sees nothing is 0."""
    scores = masked_scores(scores, mask)
    return torch.where(scores.amax(-1, keepdim=True) == -torch.inf, 0.0, torch.softmax(scores, dim=-1))
