"""attention_received blocked over query rows: no [T, T] is ever materialized. Plain torch, so that it runs on GPUs too.

The block size depends on one segment alone, so that a picture gets the same result alone and in a batch.
"""

import torch
from torch import Tensor

from qpcompile.kernels.segment_attention.blocks import check_segments, equal_lengths

# Scores in memory at once, 8 MiB of float32.
PIECE = 1 << 21


def attention_received(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, class_token: bool) -> Tensor:
    """Shapes as in reference.py."""
    q, k = q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if class_token:
        return _attention(q[:, :, :1], k, scale)[:, :, 0].mean(dim=1)
    if cu_seqlens is None:
        return _received(q, k, scale)
    check_segments(cu_seqlens, q.shape[2])
    y = q.new_empty(q.shape[2])
    for index in equal_lengths(cu_seqlens):
        # Contiguous: the summation order of some BLAS libraries depends on strides, which differ for a segment alone.
        queries, keys = (each[0, :, index].transpose(0, 1).contiguous() for each in (q, k))
        y[index] = _received(queries, keys, scale)
    return y.unsqueeze(0)


def _received(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q, k: f32[N, H, L, D], a segment each -> f32[N, L]."""
    heads, length = q.shape[1:3]
    step = max(1, PIECE // (heads * length))
    total = q.new_zeros(q.shape[0], length)
    for part, queries, keys in zip(*(each.split(max(1, step // length)) for each in (total, q, k)), strict=True):
        for rows in queries.split(step, dim=2):
            part += _attention(rows, keys, scale).sum(dim=2).mean(dim=1)
    return total


def _attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q: f32[N, H, R, D], k: f32[N, H, L, D] -> f32[N, H, R, L]."""
    return torch.softmax(q @ k.mT * scale, dim=-1)
