"""Block-diagonal attention over a packed sequence: a token attends to its own segment only.

    y_h[i] = softmax_j(scale * q_h[i] . k_g[j]) v_g[j],   j in the segment of i,   g = h // (Hq / Hkv)

Segments are pictures or windows of a picture; segment s holds the tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1.
Written with an explicit [T, T] mask, which the other back ends never materialize.
Source: "Patch n' Pack: NaViT", section 2.1 (arXiv 2307.06304); windows: "Qwen2.5-VL", section 2.1 (arXiv 2502.13923).
"""

import torch
from torch import Tensor


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """q: f[1, Hq, T, D], k: f[1, Hkv, T, D], v: f[1, Hkv, T, Dv], cu_seqlens: i[S + 1] from 0 to T -> f[1, Hq, T, Dv].

    Computed in float32. Segments may be empty.
    """
    repeats = q.shape[1] // k.shape[1]
    keys, values = (each.float().repeat_interleave(repeats, dim=1) for each in (k, v))
    segment = segment_of(cu_seqlens, q.shape[2])
    scores = (q.float() @ keys.mT * scale).masked_fill(segment[:, None] != segment[None, :], -torch.inf)
    return tokens_outside(scores.softmax(dim=-1) @ values).to(q.dtype)


def segment_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """The segment of every token, i64[T]: the number of segments that end before it."""
    position = torch.arange(length, device=cu_seqlens.device)
    return (position[:, None] >= cu_seqlens[None, 1:]).sum(dim=-1)


def tokens_outside(y: Tensor) -> Tensor:
    """y: f[1, H, T, D] -> the same, stored as [1, T, H, D], like torch's own attention: graphs rely on that layout."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)
