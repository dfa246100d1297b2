"""GPU kernel of rope_kv_write and rope_kv_append: a program turns a few heads of tokens and writes codes.

A head is held as its two halves, which the rotary embedding turns into each other and whose 4-bit codes share bytes.
Its rotation is the same as that of both halves' sum and difference: T_D = [[T, T], [T, -T]] / sqrt(2), T = T_{D/2}. So
they stay in registers from the projection to the codes (kernels/hadamard/triton.py rotates a tile).

Programs of queries come first, then those of keys and of values. Operands are views [B, H, S, D] of [B, S, *]: they are
read by their strides, without a copy. Codes are written after those of the tokens before, at slot `start` of `slots`.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from qpcompile.kernels.kv_write.triton import affine_codes, kv_write, round_even
from qpcompile.kernels.rope.triton import rope
from qpcompile.kernels.rope_kv_append.reference import appended, divided
from qpcompile.kernels.rope_kv_write.reference import Written


@triton.jit
def largest(x: tl.tensor, TOKENS: tl.constexpr) -> tl.tensor:
    """x: f32[R, PAD] -> f32[TOKENS, 1]: the largest element of each head, whose tile is R / TOKENS rows."""
    y = tl.max(x, 1, keep_dims=True)
    return tl.max(y, 0, keep_dims=True) if TOKENS == 1 else y


@triton.jit
def write_codes(
    codes_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    slot: tl.tensor,
    channel: tl.tensor,
    here: tl.tensor,
    inside: tl.tensor,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """low, high: the halves of heads -> codes: u8[.., 2 HALF BITS / 8], affine: f32[.., 2], at `slot`: [TOKENS, 1]."""
    HIGHEST: tl.constexpr = 2**BITS - 1
    low, high = tl.where(here, low, 0.0), tl.where(here, high, 0.0)
    least = tl.minimum(-largest(tl.maximum(-low, -high), TOKENS), 0.0)
    span = tl.maximum(largest(tl.maximum(low, high), TOKENS), 0.0) - least
    scale = tl.div_rn(span, tl.zeros_like(span) + HIGHEST)
    scale = tl.where(scale == 0.0, 1.0, scale)
    # tl.max drops NaN; a token with NaN must stay NaN, as in the reference.
    poisoned = largest(((low != low) | (high != high)).to(tl.float32), TOKENS)
    scale = tl.where(poisoned > 0, float("nan"), scale)
    zero = round_even(tl.div_rn(-least, scale))
    first = affine_codes(low, scale, zero, HIGHEST).to(tl.int32)
    second = affine_codes(high, scale, zero, HIGHEST).to(tl.int32)
    if BITS == 4:
        tl.store(codes_ptr + slot * HALF + channel, (first | second << 4).to(tl.uint8), mask=here)
    else:
        tl.store(codes_ptr + slot * (2 * HALF) + channel, first.to(tl.uint8), mask=here)
        tl.store(codes_ptr + slot * (2 * HALF) + HALF + channel, second.to(tl.uint8), mask=here)
    tl.store(affine_ptr + slot * 2, scale, mask=inside)
    tl.store(affine_ptr + slot * 2 + 1, zero, mask=inside)


@triton.jit
def rope_kv_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    center_ptr: tl.tensor,
    y_ptr: tl.tensor,
    k_codes_ptr: tl.tensor,
    k_affine_ptr: tl.tensor,
    v_codes_ptr: tl.tensor,
    v_affine_ptr: tl.tensor,
    B: tl.tensor,
    H: tl.tensor,
    G: tl.tensor,
    S: tl.tensor,
    start: tl.tensor,
    slots: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    cos_batch: tl.tensor,
    cos_token: tl.tensor,
    sin_batch: tl.tensor,
    sin_token: tl.tensor,
    norm: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTER: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    PAD: tl.constexpr,
    ODD: tl.constexpr,
    TABLES: tl.constexpr,
    ROTATE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    CENTER: tl.constexpr,
) -> None:
    """q: f[B, H, S, 2 HALF], k, v: f[B, G, S, 2 HALF], cos, sin: f[B, 1, S, 2 HALF], center: f[G, 2 HALF] -> y: as
    q, codes: u8[B, G, slots, 2 HALF bits / 8], affine: f32[B, G, slots, 2]. inner: `inner_factor` of HALF channels.
    """
    ROWS: tl.constexpr = OUTER * MIDDLE
    program = tl.program_id(0)
    queries, keys = tl.cdiv(B * H * S, TOKENS), tl.cdiv(B * G * S, TOKENS)
    is_query, is_value = program < queries, program >= queries + keys
    heads = tl.where(is_query, H, G)
    place = program - tl.where(is_query, 0, tl.where(is_value, queries + keys, queries))
    row = (place.to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    batch, head, token = row // (heads * S), row // S % heads, row % S
    channel = tile_channels(0, HALF, 1, ROWS, INNER, PAD)
    here = (tl.arange(0, PAD) < INNER)[None, :] & (row < B * heads * S)
    if is_query:
        x = q_ptr + batch * q_batch + head * q_head + token * q_token
    elif is_value:
        x = v_ptr + batch * v_batch + head * v_head + token * v_token
    else:
        x = k_ptr + batch * k_batch + head * k_head + token * k_token
    low = tl.load(x + channel, mask=here, other=0.0).to(tl.float32)
    high = tl.load(x + HALF + channel, mask=here, other=0.0).to(tl.float32)
    if not is_value:
        if TABLES:
            cos = cos_ptr + batch * cos_batch + token * cos_token + channel
            sin = sin_ptr + batch * sin_batch + token * sin_token + channel
            first = low * tl.load(cos, mask=here, other=0.0).to(tl.float32)
            first -= high * tl.load(sin, mask=here, other=0.0).to(tl.float32)
            high = high * tl.load(cos + HALF, mask=here, other=0.0).to(tl.float32)
            high += low * tl.load(sin + HALF, mask=here, other=0.0).to(tl.float32)
            low = first.to(y_ptr.dtype.element_ty).to(tl.float32)
            high = high.to(y_ptr.dtype.element_ty).to(tl.float32)
        if ROTATE:
            total = rotate_tile(low + high, inner_ptr, norm, OUTER, MIDDLE, INNER, PAD, ODD)
            high = rotate_tile(low - high, inner_ptr, norm, OUTER, MIDDLE, INNER, PAD, ODD)
            low = total.to(y_ptr.dtype.element_ty).to(tl.float32)
            high = high.to(y_ptr.dtype.element_ty).to(tl.float32)
    if is_query:
        y = y_ptr + row * (2 * HALF) + channel
        tl.store(y, low.to(y_ptr.dtype.element_ty), mask=here)
        tl.store(y + HALF, high.to(y_ptr.dtype.element_ty), mask=here)
    else:
        if CENTER:
            center = center_ptr + head * (2 * HALF) + channel
            of_key = here & (row < tl.where(is_value, 0, B * heads * S))
            low -= tl.load(center, mask=of_key, other=0.0).to(tl.float32)
            high -= tl.load(center + HALF, mask=of_key, other=0.0).to(tl.float32)
            low = low.to(y_ptr.dtype.element_ty).to(tl.float32)
            high = high.to(y_ptr.dtype.element_ty).to(tl.float32)
        slot = row // S * slots + start + token
        inside = row < B * heads * S
        if is_value:
            write_codes(v_codes_ptr, v_affine_ptr, low, high, slot, channel, here, inside, HALF, TOKENS, V_BITS)
        else:
            write_codes(k_codes_ptr, k_affine_ptr, low, high, slot, channel, here, inside, HALF, TOKENS, K_BITS)


def tiling_of(size: int, rotate: bool) -> Tiling | None:
    """The tile of half a head of `size` channels; None if its rotation fits no tile."""
    found = rotated_tiling(size // 2) if rotate else replace(plain_tiling(size // 2), tokens=16)
    return None if found is None or found.parts > 1 else found


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    center: Tensor | None = None,
) -> Written:
    """q: f[B, H, S, D], k, v: f[B, G, S, D], D even, cos, sin: f[B | 1, 1, S | 1, D], center: f[1, G, 1, D] ->
    `Written`.
    """
    return _written(q, k, v, cos, sin, rotate, k_bits, v_bits, center, ())


def rope_kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    *past: Tensor | None,
) -> Written:
    """The same, after the tokens of past: codes u8[B, G, P, D bits / 8], affine f32[B, G, P, 2] of keys and values."""
    parts, center = divided(past)
    return _written(q, k, v, cos, sin, rotate, k_bits, v_bits, center, parts)


def _written(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    center: Tensor | None,
    past: tuple[Tensor, ...],
) -> Written:
    tiling = tiling_of(q.shape[3], rotate)
    if tiling is None:
        return _by_parts(q, k, v, cos, sin, rotate, k_bits, v_bits, center, past)
    q, k, v = (each if each.stride(3) == 1 else each.contiguous() for each in (q, k, v))
    (batch, heads, tokens, size), groups = q.shape, k.shape[1]
    before = past[0].shape[2] if past else 0
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cache = [
        torch.empty((batch, groups, before + tokens, width), dtype=dtype, device=q.device)
        for bits in (k_bits, v_bits)
        for width, dtype in ((size * bits // 8, torch.uint8), (2, torch.float32))
    ]
    for part, old in zip(cache, past, strict=False):
        part[:, :, :before] = old
    programs = triton.cdiv(batch * heads * tokens, tiling.tokens)
    programs += 2 * triton.cdiv(batch * groups * tokens, tiling.tokens)
    if programs:
        read = [None if each is None else _table(each).expand(batch, 1, tokens, size) for each in (cos, sin)]
        strides = [each.stride()[:3] for each in (q, k, v)]
        steps = [(0, 0) if each is None else (each.stride(0), each.stride(2)) for each in read]
        inner = inner_factor(tiling, q.device) if rotate else q
        rope_kv_kernel[(programs,)](
            q, k, v, *[q if each is None else each for each in read], inner,
            q if center is None else center.contiguous(), y, *cache, batch, heads, groups, tokens, before,
            before + tokens, *strides[0], *strides[1], *strides[2], *steps[0], *steps[1], norm_of(size),
            *tiling.shape, odd_factor(tiling.channels), cos is not None, rotate, k_bits, v_bits, center is not None,
            num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y, cache[0], cache[1], cache[2], cache[3]


def _table(table: Tensor) -> Tensor:
    return table if table.stride(3) == 1 else table.contiguous()


def _by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    center: Tensor | None,
    past: tuple[Tensor, ...],
) -> Written:
    """By the kernels of its parts."""
    if cos is not None and sin is not None:
        q, k = rope(q, cos, sin), rope(k, cos, sin)
    if rotate:
        q, k = hadamard_cuda(q, None), hadamard_cuda(k, None)
    k = k if center is None else k - center.to(k.dtype)
    written = q, *kv_write(k, k_bits), *kv_write(v, v_bits)
    return appended(written, past) if past else written
