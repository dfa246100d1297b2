"""qpcompile::quantize_dynamic: dynamic quantization of activations to 4-bit codes and scales."""

import torch
from torch import Tensor

from qpcompile.kernels.quantize_dynamic import cpu
from qpcompile.kernels.quantize_dynamic.rule import RULE


@torch.library.custom_op("qpcompile::quantize_dynamic", mutates_args=(), device_types="cpu")
def quantize_dynamic(x: Tensor, group_size: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.quantize_dynamic(x, group_size, clip_ratio)


@quantize_dynamic.register_kernel("cuda")
def _quantize_dynamic_cuda(x: Tensor, group_size: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.quantize_dynamic import triton

    RULE.check(x, group_size, clip_ratio)
    return triton.quantize_dynamic(x, group_size, clip_ratio)


@quantize_dynamic.register_fake
def _quantize_dynamic_fake(x: Tensor, group_size: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    return RULE.fake(x, group_size, clip_ratio)


OVERLOAD = torch.ops.qpcompile.quantize_dynamic.default
