"""qpcompile::attention_received: the attention mass of each token in a vision tower, a score for pruning methods."""

import torch
from torch import Tensor

from qpcompile.kernels.attention_received import pieces
from qpcompile.kernels.attention_received.rule import RULE

WHERE = "qpcompile::attention_received"


@torch.library.custom_op(WHERE, mutates_args=())
def attention_received(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, class_token: bool) -> Tensor:
    """q: f[B, Hq, T, D], k: f[B, Hkv, T, D], cu_seqlens: i[S + 1] with B = 1, or None -> f32[B, T].

    class_token: score by the attention from token 0 of each row, else from all tokens of the segment.
    """
    RULE.check(q, k, cu_seqlens, scale, class_token)
    return pieces.attention_received(q, k, cu_seqlens, scale, class_token)


@attention_received.register_fake
def _(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, class_token: bool) -> Tensor:
    return RULE.fake(q, k, cu_seqlens, scale, class_token)


OVERLOAD = torch.ops.qpcompile.attention_received.default
