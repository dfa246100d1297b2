"""The CPU path of silu_mul_quantize: the reference's arithmetic in one reused buffer, bit for bit."""

from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.quantize_int4.cpu import quantize_int4
from qpcompile.kernels.sums import by_rows, wide_type


def silu_mul_quantize(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """gate, up: f[..., C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""

    def piece(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_int4(transform(silu_mul(gate, up), transform_scale, rotate), group_size, clip_ratio)

    q, scale = by_rows(piece, gate, up)
    return q, scale


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: f[..., C] -> f32[..., C]."""
    values = gate.to(wide_type(gate))
    return values.sigmoid().mul_(values).mul_(up).float()
