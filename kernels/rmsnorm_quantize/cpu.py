"""The CPU path of rmsnorm_quantize: the reference's arithmetic in reused buffers, bit for bit."""

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.quantize_int4.cpu import quantize_int4
from qpcompile.kernels.sums import by_rows, wide_type


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

    def piece(rows: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_int4(transform(rmsnorm(rows, weight, eps), transform_scale, rotate), group_size, clip_ratio)

    q, scale = by_rows(piece, x)
    return q, scale


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight: f[C] -> f32[..., C]."""
    # The layout decides the order in which torch adds a mean up; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    buffer = values * values
    norm = buffer.mean(-1, keepdim=True).add_(eps).sqrt_()
    return torch.div(values, norm, out=buffer).mul_(weight).float()
