"""GPU kernel of all operators with this epilogue: rows are computed, transformed and rounded to codes in registers.

A token is read once and written once. Its tile is transformed by the Hadamard rotation (kernels/hadamard/triton.py) or
by learned factors (kernels/kronecker/triton.py). With scales per group, and for widths that fit no tile, the values go
through global memory. The functions that compute rows are in the operators' own triton.py.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.activation_quantize.triton import activation_tile
from qpcompile.kernels.attention_kv.triton import Partial, joined_tile
from qpcompile.kernels.hadamard.op import hadamard_cuda
from qpcompile.kernels.hadamard.triton import (
    Tiling,
    inner_factor,
    norm_of,
    odd_factor,
    plain_tiling,
    rotate_tile,
    rotated_tiling,
    tile_channels,
)
from qpcompile.kernels.kronecker.triton import change_tile, factor_tiling, kronecker
from qpcompile.kernels.quantize_dynamic.reference import highest
from qpcompile.kernels.quantize_dynamic.triton import quantize_dynamic, quantize_tile
from qpcompile.kernels.rmsnorm_quantize.triton import norm_tile
from qpcompile.kernels.row_stride import in_rows, row_stride
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments


@dataclass(frozen=True, eq=False)
class Rows:
    """How a row is computed.

    kind: plain, rmsnorm, layernorm, or a function of activation_quantize. x: f[..., C]; up: f[..., C], multiplied with
    its result, or None; weight, bias: f[C] of a norm. partial: attention, rounded to the type of x, which is not read.
    """

    kind: str
    x: Tensor
    up: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    partial: Partial | None = None


@triton.jit
def rows_kernel(
    x_ptr: tl.tensor,
    up_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    y_ptr: tl.tensor,
    token_scale_ptr: tl.tensor,
    T: tl.tensor,
    x_stride: tl.tensor,
    up_stride: tl.tensor,
    eps: tl.tensor,
    clip_ratio: tl.tensor,
    norm: tl.constexpr,
    KIND: tl.constexpr,
    CHANGE: tl.constexpr,
    ODD: tl.constexpr,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTER: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    PAD: tl.constexpr,
    FILLED: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    CODES: tl.constexpr,
    HIGHEST: tl.constexpr,
    Q: tl.tensor,
    G: tl.tensor,
    splits: tl.tensor,
    D: tl.constexpr,
    BITS: tl.constexpr,
    V_PAD: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
) -> None:
    """x, up: f[T, C], x_stride and up_stride from token to token -> y: i8[T, C] and token_scale: f32[T] (CODES), or
    y: f[T, C].

    weight, bias: f[C], scale, shift: f32[C]. CHANGE: none, rotated (left: `inner_factor`) or factors (left: f32[FILLED,
    FILLED], right: f32[INNER, INNER]). FILLED: the rows of the tile that hold channels. Program (t, p): part p of its
    tokens. D: the channels of a head where attention is joined, 0 elsewhere; up and weight are then sums and ends of
    `joined_tile`.
    """
    ROWS: tl.constexpr = OUTER * MIDDLE
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = (tl.arange(0, PAD) < INNER)[None, :] & (tl.arange(0, ROWS) < FILLED)[:, None]
    here = inside & (token < T)
    y = tl.zeros((TOKENS * ROWS, PAD), tl.float32)
    for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        channel = tile_channels(part, C, PARTS, ROWS, INNER, PAD)
        if D:
            x = joined_tile(up_ptr, weight_ptr, token, channel, here, Q, G, splits, D, BITS, V_PAD, SHARE, HEAD_ROWS)
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        else:
            x = tl.load(x_ptr + token * x_stride + channel, mask=here, other=0.0).to(tl.float32)
        if KIND == "rmsnorm" or KIND == "layernorm":
            x = norm_tile(x, weight_ptr + channel, bias_ptr + channel, inside, eps, KIND == "layernorm", C, TOKENS)
        elif KIND != "plain":
            x = activation_tile(x, KIND)
        if GATED:
            x = x * tl.load(up_ptr + token * up_stride + channel, mask=here, other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(scale_ptr + channel, mask=inside, other=0.0)
        if part == 0:
            y = x
        else:
            # The factor H_2 of two parts: the second half of the output is the difference.
            y += x * (1 - 2 * tl.program_id(1)).to(tl.float32)
    channel = tile_channels(tl.program_id(1), C, PARTS, ROWS, INNER, PAD)
    if CHANGE == "rotated":
        y = rotate_tile(y, left_ptr, norm, OUTER, MIDDLE, INNER, PAD, ODD)
    elif CHANGE == "factors":
        y = change_tile(y, left_ptr, right_ptr, FILLED, INNER, ROWS, PAD)
    if SHIFTED:
        y = y - tl.load(shift_ptr + channel, mask=inside, other=0.0)
    if CODES:
        codes, scale = quantize_tile(tl.where(inside, y, 0.0), clip_ratio, HIGHEST, TOKENS)
        tl.store(y_ptr + token * C + channel, codes, mask=here)
        tl.store(token_scale_ptr + token, scale, mask=token < T)
    else:
        tl.store(y_ptr + token * C + channel, y.to(y_ptr.dtype.element_ty), mask=here)


def transform_quantize(x: Tensor, *epilogue: *EpilogueArguments) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    return rows_quantize(Rows("plain", x), Epilogue(*epilogue))


def rows_quantize(rows: Rows, end: Epilogue) -> tuple[Tensor, Tensor]:
    """Computed rows [..., C] -> q: i8[..., C], scale: f32[..., G]."""
    tiling = _tiling(rows, end)
    if tiling is None:
        values = _launch(rows, Epilogue(), plain_tiling(rows.x.shape[-1]), torch.float32)[0]
        return quantize_dynamic(_through_memory(values, end), end.group_size, end.clip_ratio, end.bits)
    if end.group_size or tiling.parts > 1:
        values = _launch(rows, end, tiling, torch.float32)[0]
        return quantize_dynamic(values, end.group_size, end.clip_ratio, end.bits)
    return _launch(rows, end, tiling, torch.int8)


def rows_stored(rows: Rows) -> Tensor:
    """Computed rows [..., C] -> f[..., C] in the type of `rows.x`."""
    return _launch(rows, Epilogue(), plain_tiling(rows.x.shape[-1]), rows.x.dtype)[0]


def _tiling(rows: Rows, end: Epilogue) -> Tiling | None:
    """The tile of a program, or None if the transform fits none, or cuts a token that a norm needs whole."""
    channels = rows.x.shape[-1]
    if end.left is not None and end.right is not None:
        return factor_tiling(end.left, end.right)
    if not end.rotate:
        return plain_tiling(channels)
    found = rotated_tiling(channels)
    return None if found is not None and found.parts > 1 and rows.kind.endswith("norm") else found


def _through_memory(values: Tensor, end: Epilogue) -> Tensor:
    """values: f32[..., C] -> f32[..., C], transformed by an operator of its own."""
    if end.left is not None and end.right is not None:
        values = kronecker(values, end.transform_scale, end.left, end.right)
    elif end.rotate:
        values = hadamard_cuda(values, end.transform_scale)
    return values if end.shift is None else values - end.shift


def _launch(rows: Rows, end: Epilogue, tiling: Tiling, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (int8) and scales, or dtype[..., C] and undefined scales."""
    x = in_rows(rows.x)
    up = x if rows.up is None else in_rows(rows.up)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if scale.numel():
        change = "factors" if end.left is not None else "rotated" if end.rotate else "none"
        left = inner_factor(tiling, x.device) if change == "rotated" else end.left
        weight, joined = rows.weight, (1, 1, 0, 0, 8, 1, 1, 1)
        if (of := rows.partial) is not None:
            splits, head_rows, _, pad = of.sizes
            up, weight = of.sums, of.ends
            joined = (of.queries, of.groups, splits, of.head_dim, of.bits, pad, of.share, head_rows)
        read = (weight, rows.bias, end.transform_scale, left, end.right, end.shift)
        rows_kernel[(triton.cdiv(scale.numel(), tiling.tokens), tiling.parts)](
            x, up, *[x if each is None else each.contiguous() for each in read], y, scale, scale.numel(), row_stride(x),
            1 if rows.partial else row_stride(up), rows.eps, end.clip_ratio, norm_of(tiling.channels), rows.kind,
            change, odd_factor(tiling.channels), *tiling.shape,
            tiling.filled, tiling.parts, rows.up is not None, end.transform_scale is not None, end.shift is not None,
            dtype == torch.int8, highest(end.bits), *joined,
            num_warps=tiling.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y, scale
