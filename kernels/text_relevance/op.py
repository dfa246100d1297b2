"""`qpcompile::text_relevance`: score visual tokens by cosine with the question. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.kernels.text_relevance import reference
from qpcompile.kernels.text_relevance.rule import RULE

WHERE = "qpcompile::text_relevance"


@torch.library.custom_op(WHERE, mutates_args=())
def text_relevance(hidden: Tensor, visual: Tensor, valid: Tensor, sign: int) -> Tensor:
    """hidden: f[B, S, C], visual, valid: bool[B, S], sign: 1 or -1 -> f32[B, S] in 0..1."""
    RULE.check(hidden, visual, valid, sign)
    return reference.text_relevance(hidden, visual, valid, sign).contiguous()


@text_relevance.register_fake
def _(hidden: Tensor, visual: Tensor, valid: Tensor, sign: int) -> Tensor:
    return RULE.fake(hidden, visual, valid, sign)


OVERLOAD = torch.ops.qpcompile.text_relevance.default
