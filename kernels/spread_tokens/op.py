"""`qpcompile::spread_tokens`: select top-scoring tokens plus evenly spaced ones of the others."""

import torch
from torch import Tensor

from qpcompile.kernels.spread_tokens import reference
from qpcompile.kernels.spread_tokens.rule import RULE

WHERE = "qpcompile::spread_tokens"


@torch.library.custom_op(WHERE, mutates_args=())
def spread_tokens(scores: Tensor, counted: Tensor, budget: Tensor, share: float) -> Tensor:
    """scores: f32[B, S], counted: bool[B, S], budget: i64[B] counted tokens to keep, share: 0..1 -> f32[B, S].

    2 for the best, 1 for the evenly spaced ones, 0 for the rest. Plain torch on every device.
    """
    RULE.check(scores, counted, budget, share)
    return reference.spread_tokens(scores, counted, budget, share).contiguous()


@spread_tokens.register_fake
def _(scores: Tensor, counted: Tensor, budget: Tensor, share: float) -> Tensor:
    return RULE.fake(scores, counted, budget, share)


OVERLOAD = torch.ops.qpcompile.spread_tokens.default
