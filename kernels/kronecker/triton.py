"""GPU kernel of kronecker: a token is a tile [A, c] in registers, between two small products.

Tensor cores accumulate in float32, from operands split into TF32 parts. Torch multiplies if a tile does not fit (PART).
Other operators fuse the product by calling `change_tile` on values in registers.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.hadamard.triton import PART, SIDE, Tiling
from qpcompile.kernels.kronecker.reference import check_factors


@triton.jit
def factor_tile(pointer: tl.tensor, SIZE: tl.constexpr, PAD: tl.constexpr) -> tl.tensor:
    """f32[SIZE, SIZE] -> f32[PAD, PAD], zero-padded."""
    place = tl.arange(0, PAD)
    inside = (place < SIZE)[:, None] & (place < SIZE)[None, :]
    return tl.load(pointer + place[:, None] * SIZE + place[None, :], mask=inside, other=0.0)


@triton.jit
def change_tile(
    x: tl.tensor,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """x: f32[ROWS, COLUMNS], 0 in the padding, left: f32[LEFT, LEFT], right: f32[RIGHT, RIGHT] -> left x right."""
    x = tl.dot(x, factor_tile(right_ptr, RIGHT, COLUMNS), input_precision="tf32x3")
    return tl.dot(factor_tile(left_ptr, LEFT, ROWS), x, input_precision="tf32x3")


@triton.jit
def kronecker_kernel(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    y_ptr: tl.tensor,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """x: f[T, C], scale: f32[C], left: f32[A, A], right: f32[c, c] -> y: f[T, C]; program t computes token t."""
    token = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < LEFT) & (column < RIGHT)
    channel = row * RIGHT + column
    x = tl.load(x_ptr + token * (LEFT * RIGHT) + channel, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(scale_ptr + channel, mask=inside, other=0.0)
    y = change_tile(x, left_ptr, right_ptr, LEFT, RIGHT, ROWS, COLUMNS)
    tl.store(y_ptr + token * (LEFT * RIGHT) + channel, y.to(y_ptr.dtype.element_ty), mask=inside)


def kronecker(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x: f[..., A*c], scale: f32[A*c], left: f32[A, A], right: f32[c, c] -> x.dtype[..., A*c]."""
    check_factors(x.shape[-1], left, right)
    tiling = factor_tiling(left, right)
    if tiling is None:
        values = x.float() if scale is None else x.float() * scale
        blocks = values.reshape(-1, left.shape[0], right.shape[0])
        return (left @ (blocks @ right)).reshape(x.shape).to(x.dtype)
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens := x.numel() // tiling.channels:
        kronecker_kernel[(tokens,)](
            x, x if scale is None else scale.contiguous(), left.contiguous(), right.contiguous(), y, tiling.filled,
            tiling.inner, tiling.rows, tiling.pad, scale is not None,
            num_warps=tiling.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def factor_tiling(left: Tensor, right: Tensor) -> Tiling | None:
    """The tiling for factors f32[A, A], f32[c, c]: one token in rows of c; None if it fits no tile."""
    filled, inner = left.shape[0], right.shape[0]
    rows, columns = (max(triton.next_power_of_2(side), SIDE) for side in (filled, inner))
    if rows * columns > PART or max(rows, columns) > 8 * SIDE:
        return None
    return Tiling(filled * inner, 1, 1, rows, 1, filled, most_warps=8)
