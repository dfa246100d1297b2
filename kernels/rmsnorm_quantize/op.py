"""qpcompile::rmsnorm_quantize: fused RMS norm and 4-bit quantization."""

import torch
from torch import Tensor

from qpcompile.kernels.rmsnorm_quantize import cpu
from qpcompile.kernels.rmsnorm_quantize.rule import RULE


@torch.library.custom_op("qpcompile::rmsnorm_quantize", mutates_args=(), device_types="cpu")
def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight: f[C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.rmsnorm_quantize(x, weight, eps, transform_scale, rotate, group_size, clip_ratio)


@rmsnorm_quantize.register_kernel("cuda")
def _rmsnorm_quantize_cuda(
    x: Tensor,
    weight: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.rmsnorm_quantize import triton

    RULE.check(x, weight, eps, transform_scale, rotate, group_size, clip_ratio)
    return triton.norm_quantize(x, weight, None, eps, transform_scale, rotate, group_size, clip_ratio)


@rmsnorm_quantize.register_fake
def _rmsnorm_quantize_fake(
    x: Tensor,
    weight: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    return RULE.fake(x, weight, eps, transform_scale, rotate, group_size, clip_ratio)


OVERLOAD = torch.ops.qpcompile.rmsnorm_quantize.default
