"""CPU kernel of linear_w4a16: C for few rows, half a byte per weight; torch on dequantized parts for many."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_w4a16 import reference
from qpcompile.kernels.linear_w4a16.rule import RULE
from qpcompile.kernels.native import library as native

FEW_ROWS = 16
CHANNELS = 1024
"""Output channels dequantized at a time."""


@RULE.checked
def linear_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: f[..., K], weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw], bias: f[N] -> x.dtype[..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    if not native.takes(x, bias) or not len(rows):
        return reference.linear_w4a16(x, weight, weight_scale, bias)
    compute = _native if len(rows) <= FEW_ROWS else _in_parts
    return compute(rows, weight, weight_scale, bias).view(*x.shape[:-1], len(weight))


def _native(
    rows: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, level: int | None = None
) -> Tensor:
    """rows: f[T, K] -> [T, N], in one C call."""
    operands = rows.contiguous(), weight.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((len(rows), len(weight)), dtype=rows.dtype)
    native.call("linear_w4a16", *operands, bias, y, *rows.shape, len(weight), weight_scale.shape[1], level=level)
    return y


def _in_parts(rows: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """rows: f[T, K] -> [T, N], with at most CHANNELS channels of the weight dequantized at a time.

    bfloat16 rows are multiplied in their own type where the processor can, as on a GPU: the weight is rounded to it.
    """
    fast = rows.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    given, y = rows if fast else rows.float(), rows.new_empty(len(rows), len(weight))
    for first in range(0, len(weight), CHANNELS):
        part = slice(first, first + CHANNELS)
        dense = dequantized(weight[part], rows.shape[1], weight_scale[part], given.dtype)
        y[:, part] = torch.nn.functional.linear(given, dense, None if bias is None else bias[part].to(given.dtype))
    return y


def dequantized(
    weight: Tensor, in_features: int, weight_scale: Tensor, dtype: torch.dtype = torch.float32, level: int | None = None
) -> Tensor:
    """weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw] -> float32 or bfloat16[N, K]; that is rounded once."""
    dense = torch.empty(len(weight), in_features, dtype=dtype)
    operands = weight.contiguous(), weight_scale.contiguous(), dense
    native.call("dequantize_int4", *operands, *dense.shape, weight_scale.shape[1], level=level)
    return dense
