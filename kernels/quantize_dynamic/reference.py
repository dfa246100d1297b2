"""Symmetric dynamic quantization of activations to 4 or 8 bits, per token or group of channels, in plain torch.

    scale = clip_ratio * max|x| / h   (1 where that is 0)      h = 7 for 4 bits, 127 for 8
    q     = clamp(round_half_even(x / scale), -h - 1, h)

Every step is an IEEE float32 operation with true division, so that all back ends produce identical codes.
Source: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, section 4.1 (per-token symmetric), arXiv 2404.00456.
"""

import torch
from torch import Tensor

from qpcompile.errors import KernelError

BITS = (4, 8)
"""The bits that a code may have; it is an int8 in either case."""


def highest(bits: int) -> int:
    """The largest code, h: 7 or 127. The lowest is -h - 1."""
    return 2 ** (bits - 1) - 1


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -highest(bits) - 1, highest(bits)


def quantize_dynamic(x: Tensor, group_size: int = 0, clip_ratio: float = 1.0, bits: int = 4) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C] of `bits` bits, scale: f32[..., G], x ≈ q * scale; group_size 0 means G = 1."""
    groups = split_groups(x.float(), group_size)
    scale = step_of(groups.abs().amax(-1), clip_ratio, bits)
    return rounded(groups / scale.unsqueeze(-1), bits).reshape(x.shape), scale


def rounded(ratio: Tensor, bits: int) -> Tensor:
    """ratio: f32[...] of values to their step -> codes: i8[...]."""
    return torch.clamp(torch.round(ratio), *code_range(bits)).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """q: i8[..., C], scale: f32[..., G] -> f32[..., C], the dequantized values."""
    groups = q.unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.unsqueeze(-1)).reshape(q.shape)


def step_of(absmax: Tensor, clip_ratio: float, bits: int) -> Tensor:
    """absmax: f32[..., G] -> f32[..., G], the quantization step."""
    # A Python scalar would let CUDA's division kernel multiply by a rounded reciprocal.
    scale = (absmax * clip_ratio) / absmax.new_full((), float(highest(bits)))
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
