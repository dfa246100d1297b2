"""qpcompile::quantize_int4: dynamic quantization of activations to 4-bit codes and scales."""

import torch
from torch import Tensor

from qpcompile.kernels.quantize_int4 import cpu
from qpcompile.kernels.quantize_int4.rule import RULE


@torch.library.custom_op("qpcompile::quantize_int4", mutates_args=(), device_types="cpu")
def quantize_int4(x: Tensor, group_size: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.quantize_int4(x, group_size, clip_ratio)


@quantize_int4.register_kernel("cuda")
def _quantize_int4_cuda(x: Tensor, group_size: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.quantize_int4 import triton

    RULE.check(x, group_size, clip_ratio)
    return triton.quantize_int4(x, group_size, clip_ratio)


@quantize_int4.register_fake
def _quantize_int4_fake(x: Tensor, group_size: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    return RULE.fake(x, group_size, clip_ratio)


OVERLOAD = torch.ops.qpcompile.quantize_int4.default
