"""GPU kernel of kv_write: a program reads a block of tokens and heads, and writes codes and scales.

Keys and values are views [B, H, S, D] of [B, S, H, D]: they are read by their strides, without a copy.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.quantize_dynamic.triton import ROUNDER

ROWS = 16


@triton.jit
def round_even(x: tl.tensor) -> tl.tensor:
    """x: f32 with |x| < 2^22, rounded half to even."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def affine_codes(x: tl.tensor, scale: tl.tensor, zero: tl.tensor, HIGHEST: tl.constexpr) -> tl.tensor:
    """x: f32[R, N], scale, zero: f32[R, 1] -> f32[R, N] in 0..HIGHEST."""
    code = round_even(tl.div_rn(x, tl.zeros_like(x) + scale)) + zero
    return tl.minimum(tl.maximum(code, 0.0), HIGHEST * 1.0)


@triton.jit
def kv_write_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    R: tl.tensor,
    H: tl.tensor,
    S: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """x: f[B, H, S, D] -> codes: u8[R, WIDTH], affine: f32[R, 2], R = B H S."""
    HIGHEST: tl.constexpr = 2**BITS - 1
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    x_row = x_ptr + row // (H * S) * batch_stride + row // S % H * head_stride + row % S * token_stride
    column = tl.arange(0, PAD)[None, :]
    here = (row < R) & (column < WIDTH)
    # Padding is 0, which is always in a token's range.
    low = tl.load(x_row + column, mask=here, other=0.0).to(tl.float32)
    high = tl.zeros_like(low)
    if BITS == 4:
        high = tl.load(x_row + WIDTH + column, mask=here & (column + WIDTH < D), other=0.0).to(tl.float32)
    least = tl.minimum(tl.min(tl.minimum(low, high), 1, keep_dims=True), 0.0)
    span = tl.maximum(tl.max(tl.maximum(low, high), 1, keep_dims=True), 0.0) - least
    scale = tl.div_rn(span, tl.zeros_like(span) + HIGHEST)
    scale = tl.where(scale == 0.0, 1.0, scale)
    # tl.max drops NaN; a token with NaN must stay NaN, as in the reference.
    poisoned = tl.max(((low != low) | (high != high)).to(tl.int32), 1, keep_dims=True)
    scale = tl.where(poisoned > 0, float("nan"), scale)
    zero = round_even(tl.div_rn(-least, scale))
    codes = affine_codes(low, scale, zero, HIGHEST).to(tl.int32)
    if BITS == 4:
        # An odd head size leaves the last high nibble 0.
        upper = affine_codes(high, scale, zero, HIGHEST).to(tl.int32)
        codes |= tl.where(column + WIDTH < D, upper, 0) << 4
    tl.store(codes_ptr + row * WIDTH + column, codes.to(tl.uint8), mask=here)
    tl.store(affine_ptr + row * 2, scale, mask=row < R)
    tl.store(affine_ptr + row * 2 + 1, zero, mask=row < R)


def kv_write(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2]."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, head_dim = x.shape
    width = (head_dim * bits + 7) // 8
    codes = torch.empty((batch, heads, length, width), dtype=torch.uint8, device=x.device)
    affine = torch.empty((batch, heads, length, 2), dtype=torch.float32, device=x.device)
    rows = batch * heads * length
    if codes.numel():
        kv_write_kernel[(triton.cdiv(rows, ROWS),)](
            x, codes, affine, rows, heads, length, *x.stride()[:3], head_dim, width, triton.next_power_of_2(width),
            bits, ROWS, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, affine
