"""CPU kernel of silu_mul_quantize: one C call, or the reference's arithmetic in one reused buffer."""

from typing import Any

from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.quantize_int4.cpu import quantize_int4
from qpcompile.kernels.silu_mul_quantize.rule import RULE
from qpcompile.kernels.sums import by_rows, wide_type


@RULE.checked
def silu_mul_quantize(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """gate, up: f[..., C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    alike = gate.dtype == up.dtype and gate.shape == up.shape
    run = _native if native.takes(gate, up, transform_scale) and alike else _torch
    return run(gate, up, transform_scale, rotate, group_size, clip_ratio)


def _native(
    gate: Tensor,
    up: Tensor,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
    level: int | None = None,
) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {"group_size": group_size, "clip_ratio": clip_ratio, "level": level}
    change: dict[str, Any] = {"scale": transform_scale, "factors": rotate}
    plan = RowPlan("silu_mul", gate.dtype, gate.shape[-1], **change, **settings)
    return plan.quantized(gate, up)


def _torch(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    def piece(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        values = transform(silu_mul(gate, up), transform_scale, rotate, wide_type(gate))
        return quantize_int4(values, group_size, clip_ratio)

    q, scale = by_rows(piece, gate, up)
    return q, scale


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: f[..., C] -> f32[..., C]."""
    values = gate.to(wide_type(gate))
    return values.sigmoid().mul_(values).mul_(up).float()
