"""CPU kernel of layernorm_quantize: one C call, or the reference's arithmetic in reused buffers."""

import torch
from torch import Tensor

from qpcompile.kernels.layernorm_quantize.rule import RULE
from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_int4.cpu import Quantizer
from qpcompile.kernels.sums import by_rows, wide_type


@RULE.checked
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
    run = _native if native.takes(x, weight, bias, transform_scale) and weight.dtype == bias.dtype else _torch
    return run(x, weight, bias, eps, Quantizer(transform_scale, rotate, group_size, clip_ratio))


def _native(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, quantizer: Quantizer, level: int | None = None
) -> tuple[Tensor, Tensor]:
    return quantizer.plan("layernorm", x, level, weight=weight, bias=bias, constant=eps).quantized(x)


def _torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    def piece(x: Tensor) -> tuple[Tensor, ...]:
        return quantizer.quantized(layernorm(x, weight, bias, eps), wide_type(x))

    q, scale = by_rows(piece, x)
    return q, scale


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight, bias: f[C] -> f32[..., C]."""
    # torch's summation order for a mean depends on the layout; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    values = values - values.mean(-1, keepdim=True)
    buffer = values * values
    norm = buffer.mean(-1, keepdim=True).add_(eps).sqrt_()
    return torch.div(values, norm, out=buffer).mul_(weight).add_(bias).float()
