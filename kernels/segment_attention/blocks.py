"""segment_attention without a mask: segments of equal length form one batch of fused attention.

Time and memory grow with the sum of squared segment lengths instead of the square of the packed length. A segment's
result does not depend on other segments, so a picture gets the same result alone and in a batch.

The vision graph of the Qwen2.5-VL testbed on one thread, ms and MB of additional peak memory:

    pictures (patches)          1 (1,024)    8 (6,736)    25 (20,912)
    with a mask [T, T]          33           1373, 225    12965, 2231
    this                        26           114, 28      598, 113
    transformers, a loop        18           126, 46      457, 130
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.attention.cpu import fused

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, attend: Attend = fused
) -> Tensor:
    """Shapes as in reference.py; `attend` computes one segment, or several of equal length."""
    check_segments(cu_seqlens, q.shape[2])
    if cu_seqlens.numel() == 2:
        return attend(q, k, v, None, scale)
    packed = [each.squeeze(0).transpose(0, 1) for each in (q, k, v)]
    y = q.new_empty(q.shape[2], q.shape[1], v.shape[3])
    for index in equal_lengths(cu_seqlens):
        rows, keys, values = (each[index].transpose(1, 2) for each in packed)
        y[index] = attend(rows, keys, values, None, scale).transpose(1, 2)
    return y.transpose(0, 1).unsqueeze(0)


def check_segments(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise KernelError unless the segments cover `tokens` tokens in order."""
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((cu_seqlens.diff() < 0).any()):
        raise KernelError(
            f"segments {cu_seqlens.tolist()[:8]}... do not cover {tokens} tokens in order",
            where="kernels/segment_attention, operand cu_seqlens",
            do="give cumulative lengths that start at 0 and end at the number of tokens",
        )


def equal_lengths(cu_seqlens: Tensor) -> list[Tensor]:
    """One i64[segments, length] of token positions per distinct length, empty segments left out."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    return [
        starts[lengths == length, None] + torch.arange(length, device=cu_seqlens.device)
        for length in lengths.unique().tolist()
        if length
    ]
