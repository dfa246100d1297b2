"""Linear layer on codes of activations and of weights, int8 each, with an exact integer product, in plain torch.

    y[t, n] = sum_g (sum_{k in g} q[t, k] w[n, k]) * scale[t, g] * weight_scale[n, g] + bias[n]

The inner sum is an exact int32. It is scaled in float32 in the order written, left to right, then cast once. Weights of
4 bits are stored packed (packing.py), those of 8 bits as they are.
Source: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, section 4, arXiv 2404.00456.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qpcompile.kernels.linear_int.packing import codes_of

Product = Callable[[Tensor, Tensor], Tensor]


def linear_int(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    """q: i8[..., K], scale: f32[..., G], weight: u8[N, ceil(K/2)] | i8[N, K], weight_scale: f32[N, Gw] -> f[..., N].

    G and Gw are equal, or one of them is 1. bias: f[N]. bits: of the codes q; of no effect on the result.
    """
    codes = codes_of(weight, q.shape[-1])
    return linear_codes(q, scale, codes, weight_scale, bias, dtype, integer_product)


def integer_product(q: Tensor, codes: Tensor) -> Tensor:
    """q: i8[T, K], codes: i8[N, K] -> i32[T, N], exact: float64 holds every sum of such products."""
    return (q.double() @ codes.double().T).to(torch.int32)


def linear_codes(
    q: Tensor,
    scale: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    product: Product,
) -> Tensor:
    """`linear_int` on unpacked weights (codes: i8[N, K]), with the given exact integer product."""
    rows, row_scale = q.reshape(-1, codes.shape[1]), scale.reshape(-1, scale.shape[-1])
    groups = max(row_scale.shape[1], weight_scale.shape[1])
    if groups == 1:
        total = _scaled(product(rows, codes), row_scale, weight_scale)
    else:
        total = torch.zeros(rows.shape[0], codes.shape[0], device=q.device)
        row_scales, weight_scales = row_scale.expand(-1, groups), weight_scale.expand(-1, groups)
        for group, (left, right) in enumerate(zip(rows.chunk(groups, 1), codes.chunk(groups, 1), strict=True)):
            one = slice(group, group + 1)
            total += _scaled(product(left, right), row_scales[:, one], weight_scales[:, one])
    if bias is not None:
        total += bias.float()
    return total.to(dtype).reshape(*q.shape[:-1], codes.shape[0])


def _scaled(exact: Tensor, row_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """exact: i32[T, N], row_scale: f32[T, 1], weight_scale: f32[N, 1] -> f32[T, N]."""
    return exact.float().mul_(row_scale).mul_(weight_scale.T)
