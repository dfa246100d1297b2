"""qpcompile::silu_mul_quantize: fused SwiGLU gate and 4-bit quantization."""

import torch
from torch import Tensor

from qpcompile.kernels.silu_mul_quantize import cpu
from qpcompile.kernels.silu_mul_quantize.rule import RULE


@torch.library.custom_op("qpcompile::silu_mul_quantize", mutates_args=(), device_types="cpu")
def silu_mul_quantize(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """gate, up: f[..., C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.silu_mul_quantize(gate, up, transform_scale, rotate, group_size, clip_ratio)


@silu_mul_quantize.register_kernel("cuda")
def _silu_mul_quantize_cuda(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.silu_mul_quantize import triton

    RULE.check(gate, up, transform_scale, rotate, group_size, clip_ratio)
    return triton.silu_mul_quantize(gate, up, transform_scale, rotate, group_size, clip_ratio)


@silu_mul_quantize.register_fake
def _silu_mul_quantize_fake(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    return RULE.fake(gate, up, transform_scale, rotate, group_size, clip_ratio)


OVERLOAD = torch.ops.qpcompile.silu_mul_quantize.default
