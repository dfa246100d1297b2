"""Fused SwiGLU gate, activation transform and 4-bit quantization.

    y = gate * sigmoid(gate) * up;   (q, scale) = quantize_int4(transform(y))

Source: GLU Variants Improve Transformer, section 2, arXiv 2002.05202.
"""

from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.quantize_int4.reference import quantize_int4
from qpcompile.kernels.sums import wide_type


def silu_mul_quantize(
    gate: Tensor, up: Tensor, transform_scale: Tensor | None, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """gate, up: f[..., C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    return quantize_int4(
        transform(silu_mul(gate, up), transform_scale, rotate, wide_type(gate)), group_size, clip_ratio
    )


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: f[..., C] -> f32[..., C]."""
    values = gate.to(wide_type(gate))
    return (values * values.sigmoid() * up).float()
