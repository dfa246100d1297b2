"""GPU kernel of silu_mul_quantize: gate and up are read once, and written once as codes.

The product is rotated (kernels/hadamard/triton.py) and rounded in registers. With scales per group, and for widths
whose rotation fits no tile, the values go through global memory.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

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
from qpcompile.kernels.quantize_int4.triton import quantize_int4, quantize_tile


@triton.jit
def silu_mul_quantize_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    transform_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    T: tl.tensor,
    clip_ratio: tl.tensor,
    norm: tl.constexpr,
    ODD: tl.constexpr,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTER: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    PAD: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    ROTATED: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """gate, up: f[T, C], transform: f32[C] -> y: i8[T, C] and scale: f32[T] (CODES, of one part), or y: f32[T, C]."""
    ROWS: tl.constexpr = OUTER * MIDDLE
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = (tl.arange(0, PAD) < INNER)[None, :]
    here = inside & (token < T)
    y = tl.zeros((TOKENS * ROWS, PAD), tl.float32)
    for part in range(PARTS):
        channel = tile_channels(part, C, PARTS, ROWS, INNER, PAD)
        gate = tl.load(gate_ptr + token * C + channel, mask=here, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + token * C + channel, mask=here, other=0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
        if SCALED:
            value = value * tl.load(transform_ptr + channel, mask=inside, other=0.0)
        # The factor H_2 of two parts, as in hadamard.
        y += value * (1 - 2 * (tl.program_id(1) & part)).to(tl.float32)
    if ROTATED:
        y = rotate_tile(y, inner_ptr, norm, OUTER, MIDDLE, INNER, PAD, ODD)
    channel = tile_channels(tl.program_id(1), C, PARTS, ROWS, INNER, PAD)
    if CODES:
        codes, scale = quantize_tile(tl.where(inside, y, 0.0), clip_ratio, TOKENS)
        tl.store(y_ptr + token * C + channel, codes, mask=here)
        tl.store(scale_ptr + token, scale, mask=token < T)
    else:
        tl.store(y_ptr + token * C + channel, y, mask=here)


def silu_mul_quantize(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """gate, up: f[..., C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    channels = gate.shape[-1]
    gate, up = gate.contiguous(), up.contiguous()
    tiling = rotated_tiling(channels) if rotate else plain_tiling(channels)
    if tiling is None:
        values = _launch(gate, up, None, False, plain_tiling(channels), None)[0]
        return quantize_int4(hadamard_cuda(values, transform_scale), group_size, clip_ratio)
    if group_size or tiling.parts > 1:
        values = _launch(gate, up, transform_scale, rotate, tiling, None)[0]
        return quantize_int4(values, group_size, clip_ratio)
    return _launch(gate, up, transform_scale, rotate, tiling, clip_ratio)


def _launch(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, tiling: Tiling, clip_ratio: float | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales, or, without a clip ratio, f32[..., C] and undefined scales."""
    codes = clip_ratio is not None
    y = torch.empty(gate.shape, dtype=torch.int8 if codes else torch.float32, device=gate.device)
    scale = torch.empty((*gate.shape[:-1], 1), dtype=torch.float32, device=gate.device)
    tokens = scale.numel()
    if tokens:
        silu_mul_quantize_kernel[(triton.cdiv(tokens, tiling.tokens), tiling.parts)](
            gate, up, gate if transform_scale is None else transform_scale.contiguous(),
            inner_factor(tiling, gate.device) if rotate else gate, y, scale, tokens, clip_ratio or 0.0,
            norm_of(tiling.channels), odd_factor(tiling.channels), *tiling.shape, tiling.parts,
            transform_scale is not None, rotate, codes,
            num_warps=tiling.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y, scale
