"""Attention that each token receives in a layer of a vision tower: from the class token, or from all tokens of its
picture.

    A = softmax_j(scale * q_i . k_j), j in the segment of i, mean over heads
    class token       s_j = A[0, j]
    none              s_j = sum over i in the segment of j of A[i, j]

The sum over queries averages 1 in every segment, so that scores of small and large pictures or windows are comparable.
The class token's attention sums to 1 over a picture.

Source: VisionZip (arXiv 2412.04467), section 3.2, and its released code for the class token; the factor is ours.
"""

import torch
from torch import Tensor

from qpcompile.kernels.segment_attention.reference import segment_of


def attention_received(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, class_token: bool) -> Tensor:
    """q: f[B, Hq, T, D], k: f[B, Hkv, T, D], cu_seqlens: i[S + 1] or None for one segment per row -> f32[B, T].

    class_token: whether token 0 of every row is the class token; each row is then one segment.
    """
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.float() @ keys.mT * scale
    if cu_seqlens is not None:
        segment = segment_of(cu_seqlens, q.shape[2])
        scores = scores.masked_fill(segment[:, None] != segment[None, :], -torch.inf)
    attention = scores.softmax(dim=-1).mean(dim=1)
    return attention[:, 0] if class_token else attention.sum(dim=1)
