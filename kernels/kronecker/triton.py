"""GPU kernels of kronecker and kronecker_quantize: a token is a tile [A, c] in registers, between two small products.

Tensor cores accumulate in float32, from operands split into TF32 parts. If a tile does not fit (PART), and with scales
per group, the values go through global memory.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.hadamard.triton import PART, SIDE
from qpcompile.kernels.kronecker.reference import check_factors
from qpcompile.kernels.quantize_int4.triton import quantize_int4, quantize_tile


@triton.jit
def factor_tile(pointer: tl.tensor, SIZE: tl.constexpr, PAD: tl.constexpr) -> tl.tensor:
    """f32[SIZE, SIZE] -> f32[PAD, PAD], zero-padded."""
    place = tl.arange(0, PAD)
    inside = (place < SIZE)[:, None] & (place < SIZE)[None, :]
    return tl.load(pointer + place[:, None] * SIZE + place[None, :], mask=inside, other=0.0)


@triton.jit
def kronecker_kernel(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    y_ptr: tl.tensor,
    token_scale_ptr: tl.tensor,
    clip_ratio: tl.tensor,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """x: f[T, C], scale: f32[C], left: f32[A, A], right: f32[c, c] -> y: f[T, C], or i8[T, C] and token_scale: f32[T].

    Program t computes token t. CODES: write codes and scales instead of values.
    """
    token = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < LEFT) & (column < RIGHT)
    channel = row * RIGHT + column
    x = tl.load(x_ptr + token * (LEFT * RIGHT) + channel, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(scale_ptr + channel, mask=inside, other=0.0)
    x = tl.dot(x, factor_tile(right_ptr, RIGHT, COLUMNS), input_precision="tf32x3")
    y = tl.dot(factor_tile(left_ptr, LEFT, ROWS), x, input_precision="tf32x3")
    place = y_ptr + token * (LEFT * RIGHT) + channel
    if CODES:
        codes, scale = quantize_tile(y, clip_ratio, 1)
        tl.store(place, codes, mask=inside)
        tl.store(token_scale_ptr + token + tl.arange(0, 1)[:, None], scale)
    else:
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside)


def kronecker(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x: f[..., A*c], scale: f32[A*c], left: f32[A, A], right: f32[c, c] -> x.dtype[..., A*c]."""
    return _transform(x, scale, left, right, None)[0]


def kronecker_quantize(
    x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """Shapes as in `kronecker` -> q: i8[..., A*c], scale: f32[..., G]."""
    if group_size or not _fits(left, right):
        return quantize_int4(_transform(x.float(), scale, left, right, None)[0], group_size, clip_ratio)
    return _transform(x, scale, left, right, clip_ratio)


def _fits(left: Tensor, right: Tensor) -> bool:
    rows, columns = _padded(left), _padded(right)
    return rows * columns <= PART and max(rows, columns) <= 8 * SIDE


def warps(rows: int, columns: int) -> int:
    """Warps for a tile of padded sides: 32 elements per thread, 64 for the largest tile."""
    return min(max(rows * columns // 1024, 2), 8)


def _padded(factor: Tensor) -> int:
    return max(triton.next_power_of_2(factor.shape[0]), SIDE)


def _transform(
    x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor, clip_ratio: float | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales, or, without a clip ratio, values and undefined scales."""
    check_factors(x.shape[-1], left, right)
    x, codes = x.contiguous(), clip_ratio is not None
    token_scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if not _fits(left, right):
        values = x.float() if scale is None else x.float() * scale
        blocks = values.reshape(-1, left.shape[0], right.shape[0])
        return (left @ (blocks @ right)).reshape(x.shape).to(x.dtype), token_scale
    y = torch.empty(x.shape, dtype=torch.int8 if codes else x.dtype, device=x.device)
    if token_scale.numel():
        rows, columns = _padded(left), _padded(right)
        kronecker_kernel[(token_scale.numel(),)](
            x, x if scale is None else scale.contiguous(), left.contiguous(), right.contiguous(), y, token_scale,
            clip_ratio or 0.0, left.shape[0], right.shape[0], rows, columns, scale is not None, codes,
            num_warps=warps(rows, columns), num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y, token_scale
