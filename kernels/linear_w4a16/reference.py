"""Linear layer on floating-point activations and 4-bit weights: the weight is dequantized, the product is in float32.

    W[n, k] = w[n, k] * weight_scale[n, g(k)];   y = x W^T + bias, in float32

Source: AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, section 4, arXiv 2306.00978.
"""

import torch
from torch import Tensor

from qpcompile.kernels.linear_int.packing import unpack_int4
from qpcompile.kernels.quantize_dynamic.reference import dequantize


def linear_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: f[..., K], weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw], bias: f[N] -> x.dtype[..., N]."""
    return linear_float(x, dequantize_weight(weight, x.shape[-1], weight_scale), bias)


def dequantize_weight(weight: Tensor, in_features: int, weight_scale: Tensor) -> Tensor:
    """weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw] -> f32[N, K]."""
    return dequantize(unpack_int4(weight, in_features), weight_scale)


def linear_float(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: f[..., K], weight: f32[N, K], bias: f[N] -> x.dtype[..., N], in float32."""
    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, bias).to(x.dtype)
