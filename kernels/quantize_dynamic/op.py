"""qpcompile::quantize_dynamic: dynamic quantization of activations to codes of 4 or 8 bits and scales."""

import torch
from torch import Tensor

from qpcompile.kernels.quantize_dynamic import cpu
from qpcompile.kernels.quantize_dynamic.rule import RULE


@torch.library.custom_op("qpcompile::quantize_dynamic", mutates_args=(), device_types="cpu")
def quantize_dynamic(x: Tensor, group_size: int, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.quantize_dynamic(x, group_size, clip_ratio, bits)


@quantize_dynamic.register_kernel("cuda")
def _quantize_dynamic_cuda(x: Tensor, group_size: int, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.quantize_dynamic import triton

    RULE.check(x, group_size, clip_ratio, bits)
    return triton.quantize_dynamic(x, group_size, clip_ratio, bits)


@quantize_dynamic.register_fake
def _quantize_dynamic_fake(x: Tensor, group_size: int, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    return RULE.fake(x, group_size, clip_ratio, bits)


OVERLOAD = torch.ops.qpcompile.quantize_dynamic.default
