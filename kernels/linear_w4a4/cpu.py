"""The CPU path of linear_w4a4: the weight unpacked to int8, then one oneDNN integer product (VNNI where there is one).

Why torch._int_mm: on one thread of an AVX512-VNNI Xeon at K = N = 1024, in ms,

    tokens                                          1      16     208
    torch._int_mm on the transposed view        0.034   0.175   0.921
    torch._int_mm on a copy [K, N]              0.124   0.169   0.911
    onednn.qlinear_pointwise, packed weight     0.115   0.168   0.925   and 8 ms to pack the weight
    float32 linear                              0.198   0.803   4.180

An operator without state would pay the packing on every call. Unpacking the 4-bit weight costs 0.3 ms per call.
"""

import torch
from torch import Tensor

from qpcompile.kernels.linear_w4a4.packing import unpack_int4
from qpcompile.kernels.linear_w4a4.reference import linear_codes


def linear_w4a4(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """q: i8[..., K], scale: f32[..., G], weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw] -> y: dtype[..., N]."""
    return linear_unpacked(q, scale, unpack_int4(weight, q.shape[-1]), weight_scale, bias, dtype)


def linear_unpacked(
    q: Tensor, scale: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same on a weight that was unpacked before, codes: i8[N, K] contiguous."""
    return linear_codes(q, scale, codes, weight_scale, bias, dtype, integer_product)


def integer_product(q: Tensor, codes: Tensor) -> Tensor:
    """q: i8[T, K], codes: i8[N, K] -> i32[T, N], exact."""
    # The transposed view is what the one-token product is fast on. With K = 1 its strides would be ambiguous.
    right = _dense(codes).T if codes.shape[1] > 1 else _dense(codes.T)
    return torch.ops.aten._int_mm.default(_dense(q), right)


def _dense(matrix: Tensor) -> Tensor:
    """The same matrix with the strides (columns, 1)."""
    # The stride of a dimension of size 1 may be anything, even in a contiguous tensor, and oneDNN then leaves the
    # output unwritten without an error (pytorch/pytorch#195066).
    return matrix.contiguous().as_strided(matrix.shape, (matrix.shape[1], 1))
