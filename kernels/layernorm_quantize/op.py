"""qpcompile::layernorm_quantize: fused layer norm and 4-bit quantization."""

import torch
from torch import Tensor

from qpcompile.kernels.layernorm_quantize import cpu
from qpcompile.kernels.layernorm_quantize.rule import RULE


@torch.library.custom_op("qpcompile::layernorm_quantize", mutates_args=(), device_types="cpu")
def layernorm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight, bias: f[C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.layernorm_quantize(x, weight, bias, eps, transform_scale, rotate, group_size, clip_ratio)


@layernorm_quantize.register_kernel("cuda")
def _layernorm_quantize_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.layernorm_quantize import triton

    RULE.check(x, weight, bias, eps, transform_scale, rotate, group_size, clip_ratio)
    return triton.layernorm_quantize(x, weight, bias, eps, transform_scale, rotate, group_size, clip_ratio)


@layernorm_quantize.register_fake
def _layernorm_quantize_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    return RULE.fake(x, weight, bias, eps, transform_scale, rotate, group_size, clip_ratio)


OVERLOAD = torch.ops.qpcompile.layernorm_quantize.default
