"""CPU kernel of linear_w8a16: C for few rows, which reads one byte per weight; the reference for many."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_w8a16 import reference
from qpcompile.kernels.linear_w8a16.rule import RULE
from qpcompile.kernels.native import library as native

FEW_ROWS = 32


@RULE.checked
def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: f[..., K], weight: i8[N, K], weight_scale: f32[N, 1], bias: f[N] -> x.dtype[..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    if 0 < len(rows) <= FEW_ROWS and native.takes(x, bias):
        return _native(rows, weight, weight_scale, bias).view(*x.shape[:-1], len(weight))
    return reference.linear_w8a16(x, weight, weight_scale, bias)


def _native(
    rows: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, level: int | None = None
) -> Tensor:
    operands = rows.contiguous(), weight.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((len(rows), len(weight)), dtype=rows.dtype)
    native.call("linear_w8a16", *operands, bias, y, *rows.shape, len(weight), level=level)
    return y
