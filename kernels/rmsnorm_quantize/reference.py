"""Fused RMS normalization, activation transform and 4-bit quantization: a composition of three references.

    y = x / sqrt(mean(x^2) + eps) * weight;   (q, scale) = quantize_int4(transform(y))

Source: Root Mean Square Layer Normalization, section 3, arXiv 1910.07467.
"""

from torch import Tensor

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.quantize_int4.reference import quantize_int4
from qpcompile.kernels.sums import wide_type


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
    return quantize_int4(
        transform(rmsnorm(x, weight, eps), transform_scale, rotate, wide_type(x)), group_size, clip_ratio
    )


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight: f[C] -> f32[..., C]."""
    # torch's summation order for a mean depends on the layout; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    return (values / ((values * values).mean(-1, keepdim=True) + eps).sqrt() * weight).float()
