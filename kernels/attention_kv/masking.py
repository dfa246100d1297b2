"""The semantics of attention masks, shared by every attention operator.

bool: True where a query may see a key. Float: added to the scores; an entry at or below -30000 masks the key, which
covers -inf and the lowest finite values of f16, bf16 and f32 that models use. A query whose keys are all masked gets
probability 0 everywhere, so that padding rows stay finite.
"""

import torch
from torch import Tensor

FORBIDDEN = -3e4


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """mask: bool or f[...] -> allowed: bool[...], and the additive part: f32[...] or None."""
    if mask.dtype == torch.bool:
        return mask, None
    allowed = mask > FORBIDDEN
    return allowed, torch.where(allowed, mask.float(), 0.0)


def masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """scores: f[..., S] with the mask applied: masked keys are -inf."""
    if mask is None:
        return scores
    allowed, bias = split_mask(mask)
    return torch.where(allowed, scores if bias is None else scores + bias, -torch.inf)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """scores: f[..., Sq, S], mask as above -> probabilities f[..., Sq, S]; a fully masked row is 0."""
    scores = masked_scores(scores, mask)
    return torch.where(scores.amax(-1, keepdim=True) == -torch.inf, 0.0, torch.softmax(scores, dim=-1))
