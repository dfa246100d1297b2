"""CPU kernel of rmsnorm_quantize: one C call, or the reference's arithmetic in reused buffers."""

from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.quantize_int4.cpu import quantize_int4
from qpcompile.kernels.rmsnorm_quantize.rule import RULE
from qpcompile.kernels.sums import by_rows, wide_type


@RULE.checked
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
    run = _native if native.takes(x, weight, transform_scale) else _torch
    return run(x, weight, eps, transform_scale, rotate, group_size, clip_ratio)


def _native(
    x: Tensor,
    weight: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
    level: int | None = None,
) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {"group_size": group_size, "clip_ratio": clip_ratio, "level": level}
    change: dict[str, Any] = {"scale": transform_scale, "factors": rotate}
    plan = RowPlan("rmsnorm", x.dtype, x.shape[-1], weight=weight, constant=eps, **change, **settings)
    return plan.quantized(x)


def _torch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    def piece(rows: Tensor) -> tuple[Tensor, Tensor]:
        values = transform(rmsnorm(rows, weight, eps), transform_scale, rotate, wide_type(x))
        return quantize_int4(values, group_size, clip_ratio)

    q, scale = by_rows(piece, x)
    return q, scale


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight: f[C] -> f32[..., C]."""
    # torch's summation order for a mean depends on the layout; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    buffer = values * values
    norm = buffer.mean(-1, keepdim=True).add_(eps).sqrt_()
    return torch.div(values, norm, out=buffer).mul_(weight).float()
