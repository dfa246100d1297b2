"""The CPU path of layernorm_quantize: the reference's arithmetic in reused buffers, bit for bit."""

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.quantize_int4.cpu import quantize_int4
from qpcompile.kernels.sums import by_rows, wide_type


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

    def piece(rows: Tensor) -> tuple[Tensor, Tensor]:
        values = transform(layernorm(rows, weight, bias, eps), transform_scale, rotate)
        return quantize_int4(values, group_size, clip_ratio)

    q, scale = by_rows(piece, x)
    return q, scale


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight, bias: f[C] -> f32[..., C]."""
    # The layout decides the order in which torch adds a mean up; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    values = values - values.mean(-1, keepdim=True)
    buffer = values * values
    norm = buffer.mean(-1, keepdim=True).add_(eps).sqrt_()
    return torch.div(values, norm, out=buffer).mul_(weight).add_(bias).float()
