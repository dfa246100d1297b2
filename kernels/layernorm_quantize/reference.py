"""Fused layer normalization, online transform and quantization: a composition of two references.

    y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias;   (q, scale) = transform_quantize(y)

Source: Layer Normalization, section 3, arXiv 1607.06450.
"""

from torch import Tensor

from qpcompile.kernels.sums import wide_type
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments


def layernorm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight, bias: f[C] -> q: i8[..., C], scale: f32[..., G]."""
    return Epilogue(*epilogue).quantized(layernorm(x, weight, bias, eps), wide_type(x))


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight, bias: f[C] -> f32[..., C]."""
    # torch's summation order for a mean depends on the layout; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    values = values - values.mean(-1, keepdim=True)
    return (values / ((values * values).mean(-1, keepdim=True) + eps).sqrt() * weight + bias).float()
