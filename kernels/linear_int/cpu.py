"""CPU kernel of linear_int: C on the stored weight; for many tokens AMX tiles or oneDNN where they are faster.

Few tokens are bound by weight bandwidth, so the weight is multiplied in its packed form, two codes per byte. For many
tokens it is unpacked once per call, which is cheap compared with the product:

- with AMX: on tiles, in C;
- with AVX512-VNNI: to int8, and oneDNN multiplies (torch._int_mm);
- below: a panel of channels at a time, and C multiplies (panels.inc). oneDNN has no fast product of bytes there.

Weights of 8 bits are stored unpacked: the same without that step, and C multiplies rows (codes.inc).

One thread, in ms:

    K = N = 1024, Xeon with AVX512-VNNI, tokens     1      16     208
    torch._int_mm on the transposed view        0.034   0.175   0.921
    torch._int_mm on a copy [K, N]              0.124   0.169   0.911
    onednn.qlinear_pointwise, packed weight     0.115   0.168   0.925   and 8 ms to pack the weight
    unpacking to int8                                           0.05
    float32 linear                              0.198   0.803   4.180

    K = N = 2048, EPYC with AVX2, tokens            1      16     640
    C on the packed weight                       0.14    0.97      39
    torch._int_mm on the transposed view                        2,763
    float32 linear                                1.1              94
"""

import math

import torch
from torch import Tensor

from qpcompile.kernels.linear_int.packing import codes_of
from qpcompile.kernels.linear_int.reference import linear_codes
from qpcompile.kernels.linear_int.rule import RULE
from qpcompile.kernels.native import library as native

VNNI = native.LEVELS.index("avx512")
"""The level from which oneDNN has a fast integer product; below it, C is faster for any number of tokens."""
FEW_TOKENS = 16
"""The most tokens for which vector instructions multiply the packed weight, without AMX tiles."""
EXACT = 2**10
"""The most products of two int8 whose sum is exact in float32."""
FEW_BEFORE_TILES = 8
"""FEW_TOKENS with AMX tiles: 16 rows of a tile are then half empty."""


@RULE.checked
def linear_int(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    residual: Tensor | None = None,
) -> Tensor:
    """q: i8[..., K], scale: f32[..., G], weight: u8[N, ceil(K/2)] | i8[N, K], weight_scale: f32[N, Gw] -> f[..., N].

    bits: of the codes q; C looks at the codes themselves. residual: dtype[..., N], added to the rounded y as a separate
    operator would do.
    """
    operands = q, scale, weight, weight_scale, bias, dtype
    native_takes, packed = native.takes(scale, weight_scale, bias), weight.dtype == torch.uint8
    tiles = native_takes and packed and native.library().amx and scale.shape[-1] == weight_scale.shape[-1] == 1
    few = q.numel() <= (FEW_BEFORE_TILES if tiles else FEW_TOKENS) * q.shape[-1]
    if tiles and not few:
        return _on_tiles(*operands, residual)
    if native_takes and (few or native.library().level < VNNI):
        y = _in_c(*operands)
    elif native_takes:
        y = _from_codes(q, scale, native_codes(weight, q.shape[-1]) if packed else weight, *operands[3:])
    else:
        y = linear_codes(q, scale, codes_of(weight, q.shape[-1]), *operands[3:], integer_product)
    return y if residual is None else _sum(y, residual)


def _sum(y: Tensor, residual: Tensor) -> Tensor:
    """y + residual, in C where it has the type: a decode step that is recorded consists of calls in C."""
    if not native.takes(y, residual):
        return y + residual
    total = torch.empty(y.shape, dtype=y.dtype)
    native.call("add", y, residual.contiguous(), total)
    return total


def _in_c(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    level: int | None = None,
) -> Tensor:
    """One C call for any number of tokens and groups."""
    tensors = q.contiguous(), scale.contiguous(), weight.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = _empty(q, weight, dtype)
    sizes = math.prod(q.shape[:-1]), q.shape[-1], weight.shape[0], scale.shape[-1], weight_scale.shape[-1]
    native.call("linear_int", *tensors, bias, y, *sizes, level=level)
    return y.to(dtype)


def _on_tiles(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """One C call on AMX tiles for any number of tokens. One scale per token and output channel."""
    tensors = q.contiguous(), scale.contiguous(), weight.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = _empty(q, weight, dtype)
    added = residual.contiguous() if residual is not None and y.dtype == dtype else None
    sizes = math.prod(q.shape[:-1]), q.shape[-1], weight.shape[0]
    native.call("linear_int_amx", *tensors, bias, added, y, *sizes)
    return y.to(dtype) if residual is None or added is not None else y.to(dtype) + residual


def _from_codes(
    q: Tensor, scale: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """oneDNN's product; with one scale per token and output channel the epilogue runs in C."""
    if scale.shape[-1] > 1 or weight_scale.shape[-1] > 1:
        return linear_codes(q, scale, codes, weight_scale, bias, dtype, integer_product)
    exact = integer_product(q.reshape(-1, q.shape[-1]), codes)
    scale, weight_scale = scale.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = _empty(q, codes, dtype)
    native.call("scale_int32", exact.contiguous(), scale, weight_scale, bias, y, *exact.shape)
    return y.to(dtype)


def native_codes(weight: Tensor, in_features: int, level: int | None = None) -> Tensor:
    """weight: u8[N, ceil(K / 2)] -> i8[N, K], as unpack_int4 does."""
    weight = weight.contiguous()
    codes = torch.empty((weight.shape[0], in_features), dtype=torch.int8)
    native.call("unpack_int4", weight, codes, *codes.shape, level=level)
    return codes


def _empty(q: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialized result in a type that C writes, f[..., N]."""
    written = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    return torch.empty((*q.shape[:-1], weight.shape[0]), dtype=written)


def linear_unpacked(
    q: Tensor, scale: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same on an unpacked weight, codes: i8[N, K] contiguous."""
    return linear_codes(q, scale, codes, weight_scale, bias, dtype, integer_product)


def integer_product(q: Tensor, codes: Tensor) -> Tensor:
    """q: i8[T, K], codes: i8[N, K] -> i32[T, N], exact."""
    if not torch.cpu._is_vnni_supported():
        # Sums of 2^10 products are exact in float32, at most 2^24, and oneDNN's product is 30 times slower here.
        total = torch.zeros(len(q), len(codes), dtype=torch.int32)
        for left, right in zip(q.split(EXACT, 1), codes.split(EXACT, 1), strict=True):
            total += (left.float() @ right.float().T).to(torch.int32)
        return total
    # The product of one token is fast on the transposed view. With K = 1 its strides would be ambiguous.
    right = _dense(codes).T if codes.shape[1] > 1 else _dense(codes.T)
    return torch.ops.aten._int_mm.default(_dense(q), right)


def _dense(matrix: Tensor) -> Tensor:
    """The same matrix with the strides (columns, 1)."""
    # The stride of a dimension of size 1 is arbitrary, even in a contiguous tensor, and oneDNN may then leave the
    # output unwritten without an error (pytorch/pytorch#195066).
    return matrix.contiguous().as_strided(matrix.shape, (matrix.shape[1], 1))
