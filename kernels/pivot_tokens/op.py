"""`qpcompile::pivot_tokens`: select pivots and the tokens least similar to them. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.kernels.pivot_tokens import reference
from qpcompile.kernels.pivot_tokens.rule import RULE

WHERE = "qpcompile::pivot_tokens"


@torch.library.custom_op(WHERE, mutates_args=())
def pivot_tokens(
    hidden: Tensor, keys: Tensor, visual: Tensor, valid: Tensor, budget: Tensor, visual_pivots: int, text_pivots: int
) -> Tensor:
    """hidden: f[B, S, C], keys: f[B, H, S, D], visual, valid: bool[B, S], budget: i64[B] -> f32[B, S]."""
    RULE.check(hidden, keys, visual, valid, budget, visual_pivots, text_pivots)
    return reference.pivot_tokens(hidden, keys, visual, valid, budget, visual_pivots, text_pivots).contiguous()


@pivot_tokens.register_fake
def _(
    hidden: Tensor, keys: Tensor, visual: Tensor, valid: Tensor, budget: Tensor, visual_pivots: int, text_pivots: int
) -> Tensor:
    return RULE.fake(hidden, keys, visual, valid, budget, visual_pivots, text_pivots)


OVERLOAD = torch.ops.qpcompile.pivot_tokens.default
