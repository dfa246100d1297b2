"""Fused activation function or gated linear unit, online transform and quantization.

    y = f(x), or f(x) * up;   (q, scale) = transform_quantize(y)

    silu           f(x) = x sigmoid(x)
    gelu           f(x) = x / 2 (1 + erf(x / sqrt(2)))
    gelu_tanh      f(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    gelu_sigmoid   f(x) = x sigmoid(1.702 x)

Sources: GLU Variants Improve Transformer, section 2, arXiv 2002.05202; Gaussian Error Linear Units, section 2, arXiv
1606.08415.
"""

import math

import torch
from torch import Tensor

from qpcompile.kernels.sums import wide_type
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments

SLOPE, CUBIC = 1.702, 0.044715
FUNCTIONS = ("silu", "gelu", "gelu_tanh", "gelu_sigmoid")


def activation_quantize(
    x: Tensor, up: Tensor | None, function: str, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    """x, up: f[..., C], function: one of `FUNCTIONS` -> q: i8[..., C], scale: f32[..., G]."""
    return Epilogue(*epilogue).quantized(activation(x, up, function), wide_type(x))


def activation(x: Tensor, up: Tensor | None, function: str) -> Tensor:
    """x, up: f[..., C] -> f32[..., C], rounded once."""
    values = x.to(wide_type(x))
    if function == "silu":
        y = values * values.sigmoid()
    elif function == "gelu_sigmoid":
        y = values * (SLOPE * values).sigmoid()
    elif function == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), which keeps its digits where tanh is near -1.
        y = values * ((values + CUBIC * values**3) * math.sqrt(8 / math.pi)).sigmoid()
    else:
        y = values * (torch.special.erfc(values * -math.sqrt(0.5)) / 2)
    return (y if up is None else y * up).float()
