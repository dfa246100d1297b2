"""GPU kernel of hadamard: a token is a tile in registers, multiplied by three small factors on tensor cores.

    C = parts * outer * middle * inner,   T = H_parts kron H_outer kron H_middle kron R

R contains the odd factor. A product by a factor needs that factor's axis last, so the tile is transposed in between.
float32 is split into two TF32 parts, x = high + low, where `high` is x with its low 13 bits cleared: products by +-1
then lose at most 2^-20 of x. The DCT is split in two as well. A width above PART is computed as two halves of the
output, each from both halves of the input: H_2 is applied while loading.

Other operators fuse the rotation by calling `rotate_tile` on values in registers.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import functools
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.hadamard.reference import dct_matrix, split_channels, sylvester

# Elements of a tile: 64 registers of each of 256 threads, or 32 of 512.
PART = 1 << 14
# The smallest side of a tensor-core product.
SIDE = 16
CUT = tl.constexpr(-(1 << 13))


@dataclass(frozen=True)
class Tiling:
    """The register tile of a program: f32[tokens * outer * middle, inner]; several tokens only without outer.

    part_filled: the rows of a token that hold channels; 0: all. most_warps: more would have too few registers.
    """

    channels: int
    tokens: int
    parts: int
    outer: int
    middle: int
    part_filled: int = 0
    most_warps: int = 16

    @property
    def filled(self) -> int:
        return self.part_filled or self.outer * self.middle

    @property
    def inner(self) -> int:
        return self.channels // (self.parts * self.filled)

    @property
    def pad(self) -> int:
        return max(triton.next_power_of_2(self.inner), SIDE)

    @property
    def rows(self) -> int:
        return self.tokens * self.outer * self.middle

    @property
    def warps(self) -> int:
        return min(max(self.rows * self.pad // 1024, 2), self.most_warps)

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """The kernel's constants: C, tokens, outer, middle, inner, pad."""
        return self.channels, self.tokens, self.outer, self.middle, self.inner, self.pad


def rotated_tiling(channels: int) -> Tiling | None:
    """The tiling for rotating `channels`, or None if no tile fits: an odd factor above 128, or too wide."""
    power, odd = split_channels(channels)
    if channels <= 4 * SIDE or (channels <= 8 * SIDE and power < SIDE):
        return Tiling(channels, SIDE, 1, 1, 1)
    inner = odd
    while 2 * inner <= 4 * SIDE and channels // (2 * inner) >= SIDE:
        inner *= 2
    rest = channels // inner
    pad = max(triton.next_power_of_2(inner), SIDE)
    parts = max(1, rest * pad // PART)
    rest //= parts
    if inner > 8 * SIDE or rest < SIDE or parts > 2:
        return None
    middle = 1 if rest <= 8 * SIDE else SIDE
    return Tiling(channels, 1, parts, rest // middle, middle)


def plain_tiling(channels: int) -> Tiling:
    """The tiling for values that are not rotated."""
    return Tiling(channels, max(1, min(SIDE, 1024 // triton.next_power_of_2(channels))), 1, 1, 1)


def odd_factor(channels: int) -> int:
    """The odd factor of `channels`: 1 if the rotation is pure signs."""
    return split_channels(channels)[1]


def norm_of(channels: int) -> float:
    """The normalization of the sign matrices; the DCT is orthonormal already."""
    return split_channels(channels)[0] ** -0.5


@functools.cache
def inner_factor(tiling: Tiling, device: torch.device) -> Tensor:
    """Unnormalized R, copied to `device` once: f32[2, pad, pad], its TF32 part and the remainder."""
    odd = odd_factor(tiling.channels)
    matrix = np.zeros((tiling.pad, tiling.pad))
    matrix[: tiling.inner, : tiling.inner] = np.kron(sylvester(tiling.inner // odd), dct_matrix(odd))
    single = matrix.astype(np.float32)
    high = (single.view(np.int32) & -(1 << 13)).view(np.float32)
    with torch.inference_mode(False):
        return torch.from_numpy(np.stack([high, (matrix - high).astype(np.float32)])).to(device)


@triton.jit
def tile_channels(
    part: tl.tensor, C: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, PAD: tl.constexpr
) -> tl.tensor:
    """The channel of each element of a tile whose column is below INNER: i32[ROWS, PAD]."""
    return part * (C // PARTS) + tl.arange(0, ROWS)[:, None] * INNER + tl.arange(0, PAD)[None, :]


@triton.jit
def tf32_parts(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """x: f32 -> high, low with high + low = x; TF32 represents `high` exactly and `low` to 11 bits."""
    high = (x.to(tl.int32, bitcast=True) & CUT).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def times_signs(x: tl.tensor, ORDER: tl.constexpr) -> tl.tensor:
    """x: f32[R, ORDER] times Sylvester's matrix."""
    bits = tl.arange(0, ORDER)[:, None] & tl.arange(0, ORDER)[None, :]
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    signs = 1.0 - 2.0 * (bits & 1).to(tl.float32)
    high, low = tf32_parts(x)
    y = tl.dot(low, signs, input_precision="tf32")
    return tl.dot(high, signs, y, input_precision="tf32")


@triton.jit
def times_inner(x: tl.tensor, inner_ptr: tl.tensor, PAD: tl.constexpr) -> tl.tensor:
    """x: f32[R, PAD] times the transpose of R, inner: f32[2, PAD, PAD]."""
    at = inner_ptr + tl.arange(0, PAD)[:, None] + tl.arange(0, PAD)[None, :] * PAD
    matrix = tl.load(at)
    rest = tl.load(at + PAD * PAD)
    high, low = tf32_parts(x)
    y = tl.dot(low, matrix, input_precision="tf32")
    y = tl.dot(high, rest, y, input_precision="tf32")
    return tl.dot(high, matrix, y, input_precision="tf32")


@triton.jit
def rotate_tile(
    x: tl.tensor,
    inner_ptr: tl.tensor,
    norm: tl.constexpr,
    OUTER: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    PAD: tl.constexpr,
    ODD: tl.constexpr,
) -> tl.tensor:
    """x: f32[R, PAD], 0 in the padding -> f32[R, PAD], rotated; the padding stays 0 (unless a value is NaN)."""
    x = times_signs(x, PAD) if ODD == 1 and INNER == PAD else times_inner(x, inner_ptr, PAD)
    if MIDDLE > 1:
        x = tl.permute(tl.reshape(x, (OUTER, MIDDLE, PAD)), (0, 2, 1))
        x = times_signs(tl.reshape(x, (OUTER * PAD, MIDDLE)), MIDDLE)
        x = tl.permute(tl.reshape(x, (OUTER, PAD, MIDDLE)), (0, 2, 1))
        x = tl.reshape(x, (OUTER * MIDDLE, PAD))
    if OUTER > 1:
        x = tl.permute(tl.reshape(x, (OUTER, MIDDLE * PAD)), (1, 0))
        x = tl.permute(times_signs(x, OUTER), (1, 0))
        x = tl.reshape(x, (OUTER * MIDDLE, PAD))
    return x * norm


@triton.jit
def hadamard_kernel(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    y_ptr: tl.tensor,
    T: tl.tensor,
    norm: tl.constexpr,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTER: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    PAD: tl.constexpr,
    PARTS: tl.constexpr,
    ODD: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """x: f[T, C], scale: f32[C], inner: f32[2, PAD, PAD] -> y: f[T, C]; program (t, p): part p of its tokens."""
    ROWS: tl.constexpr = OUTER * MIDDLE
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = (tl.arange(0, PAD) < INNER)[None, :]
    total = tl.zeros((TOKENS * ROWS, PAD), tl.float32)
    for part in range(PARTS):
        channel = tile_channels(part, C, PARTS, ROWS, INNER, PAD)
        x = tl.load(x_ptr + token * C + channel, mask=inside & (token < T), other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(scale_ptr + channel, mask=inside, other=0.0)
        # The factor H_2 of two parts: the second half of the output is the difference.
        total += x * (1 - 2 * (tl.program_id(1) & part)).to(tl.float32)
    y = rotate_tile(total, inner_ptr, norm, OUTER, MIDDLE, INNER, PAD, ODD)
    channel = tile_channels(tl.program_id(1), C, PARTS, ROWS, INNER, PAD)
    tl.store(y_ptr + token * C + channel, y.to(y_ptr.dtype.element_ty), mask=inside & (token < T))


def hadamard(x: Tensor, scale: Tensor | None, tiling: Tiling) -> Tensor:
    """x: f[..., C], scale: f32[C], tiling: `rotated_tiling` of C -> x.dtype[..., C]."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = x.numel() // tiling.channels
    if tokens:
        hadamard_kernel[(triton.cdiv(tokens, tiling.tokens), tiling.parts)](
            x, x if scale is None else scale.contiguous(), inner_factor(tiling, x.device), y, tokens,
            norm_of(tiling.channels), *tiling.shape, tiling.parts, odd_factor(tiling.channels), scale is not None,
            num_warps=tiling.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y
