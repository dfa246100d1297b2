"""Weight-only quantized linear layer: floating-point activations, 8-bit weights, one scale per output channel.

    scale[n] = max_k |W[n, k]| / 127 (1 where that is 0);   w[n, k] = round(W[n, k] / scale[n])
    y[t, n] = (sum_k x[t, k] w[n, k]) * scale[n] + bias[n], in float32, then cast once

Source: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, section 2.1 (absmax quantization, row-wise),
arXiv 2208.07339.
"""

import torch
from torch import Tensor

LEVELS = 127.0
CHUNK = 1024
"""Output channels dequantized at a time: the weight of a head is large."""


def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: f[..., K], weight: i8[N, K], weight_scale: f32[N, 1], bias: f[N] -> x.dtype[..., N]."""
    wide = x.float()
    y = x.new_empty((*x.shape[:-1], len(weight)))
    for first in range(0, len(weight), CHUNK):
        part = slice(first, first + CHUNK)
        product = torch.nn.functional.linear(wide, weight[part].float()).mul_(weight_scale[part, 0])
        y[..., part] = product if bias is None else product.add_(bias[part].float())
    return y


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: f[N, K] -> codes: i8[N, K] from -127 to 127, scale: f32[N, 1]."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
    for first in range(0, len(weight), CHUNK):
        part = slice(first, first + CHUNK)
        wide = weight[part].float()
        step = wide.abs().amax(1, keepdim=True) / LEVELS
        step[step == 0] = 1.0
        codes[part], scale[part] = torch.round(wide / step), step
    return codes, scale
