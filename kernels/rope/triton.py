"""GPU kernel of rope: a program rotates a block of rows, of any tokens and heads.

Queries and keys are views [B, H, S, D] of [B, S, H, D]: they are read by their strides, without a copy.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


@triton.jit
def rope_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    y_ptr: tl.tensor,
    R: tl.tensor,
    H: tl.tensor,
    S: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    cos_batch: tl.tensor,
    cos_head: tl.tensor,
    cos_token: tl.tensor,
    sin_batch: tl.tensor,
    sin_head: tl.tensor,
    sin_token: tl.tensor,
    HALF: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """x: f[B, H, S, 2 HALF], cos, sin broadcast to it -> y: f[R, 2 HALF], R = B H S."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    batch, head, token = row // (H * S), row // S % H, row % S
    column = tl.arange(0, PAD)[None, :]
    here = (row < R) & (column < HALF)
    x_place = x_ptr + batch * x_batch + head * x_head + token * x_token + column
    cos_place = cos_ptr + batch * cos_batch + head * cos_head + token * cos_token + column
    sin_place = sin_ptr + batch * sin_batch + head * sin_head + token * sin_token + column
    first = tl.load(x_place, mask=here).to(tl.float32)
    second = tl.load(x_place + HALF, mask=here).to(tl.float32)
    low = first * tl.load(cos_place, mask=here).to(tl.float32) - second * tl.load(sin_place, mask=here).to(tl.float32)
    high = second * tl.load(cos_place + HALF, mask=here).to(tl.float32)
    high += first * tl.load(sin_place + HALF, mask=here).to(tl.float32)
    to = y_ptr + row * (2 * HALF) + column
    tl.store(to, low.to(y_ptr.dtype.element_ty), mask=here)
    tl.store(to + HALF, high.to(y_ptr.dtype.element_ty), mask=here)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: f[..., D] of three or four axes, cos, sin: f[..., D], broadcast to x -> x.dtype[..., D]."""
    x, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, cos, sin))
    wide = x if x.dim() == 4 else x[None]
    batch, heads, length, size = wide.shape
    strides = [each.expand(wide.shape).stride()[:3] for each in (wide, cos, sin)]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = batch * heads * length
    if rows:
        rope_kernel[(triton.cdiv(rows, ROWS),)](
            x, cos, sin, y, rows, heads, length, *strides[0], *strides[1], *strides[2], size // 2,
            triton.next_power_of_2(size // 2), ROWS, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return y
