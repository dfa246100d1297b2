"""qpcompile::quantize_static: quantization with static scales from calibration. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.kernels.quantize_static import reference
from qpcompile.kernels.quantize_static.rule import RULE


@torch.library.custom_op("qpcompile::quantize_static", mutates_args=())
def quantize_static(x: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[..., C], scale: f32[1] or f32[..., 1] -> q: i8[..., C], scale: f32[..., 1]."""
    RULE.check(x, scale, bits)
    return reference.quantize_static(x, scale, bits)


@quantize_static.register_fake
def _(x: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return RULE.fake(x, scale, bits)


OVERLOAD = torch.ops.qpcompile.quantize_static.default
