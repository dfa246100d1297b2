"""qpcompile::quantize_int4_static, quantization by scales from calibration. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.kernels.quantize_int4_static import reference


@torch.library.custom_op("qpcompile::quantize_int4_static", mutates_args=())
def quantize_int4_static(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[..., C], scale: f32[1] or f32[..., 1] -> q: i8[..., C], scale: f32[..., 1]."""
    return reference.quantize_int4_static(x, scale)


@quantize_int4_static.register_fake
def _(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


OVERLOAD = torch.ops.qpcompile.quantize_int4_static.default
