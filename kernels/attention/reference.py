"""Scaled dot-product attention over a whole prompt or picture: y = softmax(scale q k^T + mask) v.

Source: "Attention Is All You Need" (arXiv 1706.03762), section 3.2.1. A query whose keys are all masked gets 0.
"""

import torch
from torch import Tensor

from qpcompile.kernels.attention_kv.masking import masked_softmax


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q: f[B, Hq, S, D], k, v: f[B, Hkv, T, D], mask: bool or f, broadcast to [B, Hq, S, T] -> q.dtype[B, Hq, S, D]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    times = q.shape[1] // k.shape[1]
    k, v = (each.to(wide).repeat_interleave(times, dim=1) for each in (k, v))
    return (masked_softmax(q.to(wide) @ k.mT * scale, mask) @ v).to(q.dtype)
