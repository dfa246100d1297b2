"""qpcompile::segment_attention: block-diagonal (variable-length) attention over packed pictures or windows."""

import torch
from torch import Tensor

from qpcompile.kernels.segment_attention import blocks
from qpcompile.kernels.segment_attention.rule import RULE

WHERE = "qpcompile::segment_attention"


@torch.library.custom_op(WHERE, mutates_args=())
def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """q: f[1, Hq, T, D], k: f[1, Hkv, T, D], v: f[1, Hkv, T, Dv], cu_seqlens: i[S + 1] from 0 to T -> f[1, Hq, T, Dv].

    On a GPU the lengths are copied to the host, like in the models' own loop over segments.
    """
    RULE.check(q, k, v, cu_seqlens, scale)
    return blocks.segment_attention(q, k, v, cu_seqlens, scale)


@segment_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    RULE.check(q, k, v, cu_seqlens, scale)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


OVERLOAD = torch.ops.qpcompile.segment_attention.default
