"""Symmetric dynamic 4-bit quantization of activations, one scale per token or per group of channels, in plain torch.

    scale = clip_ratio * max|x| / 7   (1 where that is 0)
    q     = clamp(round_half_even(x / scale), -8, 7)

Every step is an IEEE float32 operation with true division, so that all back ends produce identical codes.
Source: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, section 4.1 (per-token symmetric), arXiv 2404.00456.
"""

import torch
from torch import Tensor

from qpcompile.errors import KernelError

LOWEST, HIGHEST = -8, 7


def quantize_dynamic(x: Tensor, group_size: int = 0, clip_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C] in [-8, 7], scale: f32[..., G], x ≈ q * scale; group_size 0 means G = 1."""
    groups = split_groups(x.float(), group_size)
    scale = int4_scale(groups.abs().amax(-1), clip_ratio)
    codes = torch.clamp(torch.round(groups / scale.unsqueeze(-1)), LOWEST, HIGHEST)
    return codes.to(torch.int8).reshape(x.shape), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """q: i8[..., C], scale: f32[..., G] -> f32[..., C], the dequantized values."""
    groups = q.unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.unsqueeze(-1)).reshape(q.shape)


def int4_scale(absmax: Tensor, clip_ratio: float) -> Tensor:
    """absmax: f32[..., G] -> f32[..., G], the quantization step."""
    # A Python scalar 7.0 would let CUDA's division kernel multiply by a rounded reciprocal.
    scale = (absmax * clip_ratio) / absmax.new_full((), 7.0)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def split_groups(x: Tensor, group_size: int) -> Tensor:
    """x: [..., C] -> [..., G, C / G]; group_size 0 makes one group of all channels."""
    return x.unflatten(-1, (group_count(x.shape[-1], group_size), -1))


def group_count(channels: int, group_size: int) -> int:
    """The number of scales per token of `channels` channels."""
    if group_size == 0:
        return 1
    if group_size < 0 or channels % group_size:
        raise KernelError(
            f"{channels} channels are not divisible into groups of {group_size}",
            where="qpcompile::quantize_dynamic",
            do="give a group size that divides the channels, or 0 for one scale per token",
        )
    return channels // group_size
