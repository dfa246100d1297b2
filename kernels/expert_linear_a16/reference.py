"""Linear layers of a mixture of experts on floating-point activations and weights of 4 or 8 bits.

    y[n, j] = W[e] x[n, i],   W[e, o, k] = w[e, o, k] * weight_scale[e, o, g(k)]     e = index[n, j], i = j // (J / I)

x: I rows per token, index: J slots per token. The product is in float32.
Source: AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, section 4, arXiv 2306.00978.
"""

import torch
from torch import Tensor

from qpcompile.kernels.expert_linear.reference import expert_linear
from qpcompile.kernels.linear_int.packing import codes_of
from qpcompile.kernels.quantize_dynamic.reference import dequantize


def expert_linear_a16(x: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor) -> Tensor:
    """x: f[N, I, K], weight: u8[E, O, ceil(K/2)] | i8[E, O, K], weight_scale: f32[E, O, Gw],
    index: i[N, J] with values 0..E-1, J a multiple of I -> x.dtype[N, J, O].
    """
    pairs = zip(weight, weight_scale, strict=True)
    dense = torch.stack([dequantize(codes_of(own, x.shape[2]), scale) for own, scale in pairs])
    return expert_linear(x.float(), dense, index).to(x.dtype)
