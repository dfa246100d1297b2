"""CPU kernel of silu_mul_quantize: one C call, or the reference's arithmetic in one reused buffer."""

from torch import Tensor

from qpcompile.kernels.native import library as native
from qpcompile.kernels.quantize_int4.cpu import Quantizer
from qpcompile.kernels.silu_mul_quantize.rule import RULE
from qpcompile.kernels.sums import by_rows, wide_type


@RULE.checked
def silu_mul_quantize(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """gate, up: f[..., C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    alike = gate.dtype == up.dtype and gate.shape == up.shape
    run = _native if native.takes(gate, up, transform_scale) and alike else _torch
    return run(gate, up, Quantizer(transform_scale, rotate, group_size, clip_ratio))


def _native(gate: Tensor, up: Tensor, quantizer: Quantizer, level: int | None = None) -> tuple[Tensor, Tensor]:
    return quantizer.plan("silu_mul", gate, level).quantized(gate, up)


def _torch(gate: Tensor, up: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    def piece(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return quantizer.quantized(silu_mul(gate, up), wide_type(gate))

    q, scale = by_rows(piece, gate, up)
    return q, scale


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: f[..., C] -> f32[..., C]."""
    values = gate.to(wide_type(gate))
    return values.sigmoid().mul_(values).mul_(up).float()
