"""GPU kernel of rmsnorm_quantize and layernorm_quantize: a token is read once, and written once as codes.

It is normalized, rotated (kernels/hadamard/triton.py) and rounded in registers. With scales per group, and for widths
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
def token_mean(x: tl.tensor, C: tl.constexpr, TOKENS: tl.constexpr) -> tl.tensor:
    """x: f32[R, PAD], 0 in the padding, one token, or TOKENS = R tokens -> f32[TOKENS, 1]."""
    total = tl.sum(x, 1, keep_dims=True)
    if TOKENS == 1:
        total = tl.sum(total, 0, keep_dims=True)
    return tl.div_rn(total, C * 1.0)


@triton.jit
def norm_quantize_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    transform_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    T: tl.tensor,
    eps: tl.tensor,
    clip_ratio: tl.tensor,
    norm: tl.constexpr,
    ODD: tl.constexpr,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTER: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    PAD: tl.constexpr,
    CENTERED: tl.constexpr,
    SCALED: tl.constexpr,
    ROTATED: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """x: f[T, C], weight, bias: f[C], transform: f32[C] -> y: i8[T, C] and scale: f32[T], or y: f32[T, C].

    CENTERED: a layer norm instead of an RMS norm. CODES: write codes and scales instead of values.
    """
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = tile_channels(0, C, 1, OUTER * MIDDLE, INNER, PAD)
    inside = (tl.arange(0, PAD) < INNER)[None, :]
    here = inside & (token < T)
    x = tl.load(x_ptr + token * C + channel, mask=here, other=0.0).to(tl.float32)
    if CENTERED:
        x = tl.where(inside, x - token_mean(x, C, TOKENS), 0.0)
    root = tl.sqrt_rn(token_mean(x * x, C, TOKENS) + eps)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    y = tl.div_rn(x, tl.zeros_like(x) + root) * weight
    if CENTERED:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        y = y * tl.load(transform_ptr + channel, mask=inside, other=0.0)
    if ROTATED:
        # 0 / sqrt(0) is NaN in the padding too, which the products would propagate.
        y = rotate_tile(tl.where(inside, y, 0.0), inner_ptr, norm, OUTER, MIDDLE, INNER, PAD, ODD)
    if CODES:
        codes, scale = quantize_tile(tl.where(inside, y, 0.0), clip_ratio, TOKENS)
        tl.store(y_ptr + token * C + channel, codes, mask=here)
        tl.store(scale_ptr + token, scale, mask=token < T)
    else:
        tl.store(y_ptr + token * C + channel, y, mask=here)


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight, bias: f[C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G].

    With a bias it is a layer norm, without one an RMS norm.
    """
    channels = x.shape[-1]
    tiling = rotated_tiling(channels) if rotate else plain_tiling(channels)
    norm = (x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), eps)
    if tiling is None or tiling.parts > 1:
        values = _launch(*norm, None, False, plain_tiling(channels), None)[0]
        return quantize_int4(hadamard_cuda(values, transform_scale), group_size, clip_ratio)
    if group_size:
        values = _launch(*norm, transform_scale, rotate, tiling, None)[0]
        return quantize_int4(values, group_size, clip_ratio)
    return _launch(*norm, transform_scale, rotate, tiling, clip_ratio)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    tiling: Tiling,
    clip_ratio: float | None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales, or, without a clip ratio, f32[..., C] and undefined scales."""
    codes = clip_ratio is not None
    y = torch.empty(x.shape, dtype=torch.int8 if codes else torch.float32, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    tokens = scale.numel()
    if tokens:
        factor = inner_factor(tiling, x.device) if rotate else x
        norm_quantize_kernel[(triton.cdiv(tokens, tiling.tokens),)](
            x, weight, weight if bias is None else bias, x if transform_scale is None else transform_scale.contiguous(),
            factor, y, scale, tokens, eps, clip_ratio or 0.0, norm_of(tiling.channels), odd_factor(tiling.channels),
            *tiling.shape, bias is not None, transform_scale is not None, rotate, codes,
            num_warps=tiling.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y, scale
