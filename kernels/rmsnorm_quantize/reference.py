"""Fused RMS normalization, online transform and quantization: a composition of two references.

    y = x / sqrt(mean(x^2) + eps) * weight;   (q, scale) = transform_quantize(y)

Source: Root Mean Square Layer Normalization, section 3, arXiv 1910.07467.
"""

from torch import Tensor

from qpcompile.kernels.sums import wide_type
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments


def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, *epilogue: *EpilogueArguments) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight: f[C] -> q: i8[..., C], scale: f32[..., G]."""
    return Epilogue(*epilogue).quantized(rmsnorm(x, weight, eps), wide_type(x))


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight: f[C] -> f32[..., C]."""
    # torch's summation order for a mean depends on the layout; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    return (values / ((values * values).mean(-1, keepdim=True) + eps).sqrt() * weight).float()
