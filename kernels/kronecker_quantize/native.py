"""qp_kronecker_quantize of native.c, which serves quantize_int4, hadamard, kronecker and kronecker_quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from qpcompile.kernels.native import ELEMENTS, call, pointer, real
from qpcompile.kernels.native_rows import Factors, dense, empty_codes, row_count


def changed_codes(
    x: Tensor,
    scale: Tensor | None,
    factors: Factors,
    shift: Tensor | None,
    group_size: int,
    clip_ratio: float,
    level: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x: f[..., C], scale, shift: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    q, q_scale = empty_codes(x, group_size)
    codes = q.data_ptr(), q_scale.data_ptr(), None
    _call(x.contiguous(), dense(scale), factors, dense(shift), group_size, clip_ratio, codes, level)
    return q, q_scale


def changed(x: Tensor, scale: Tensor | None, factors: Factors, level: int | None = None) -> Tensor:
    """x: f[..., C], scale: f32[C] -> x.dtype[..., C]."""
    y = torch.empty(x.shape, dtype=x.dtype)
    _call(x.contiguous(), dense(scale), factors, None, 0, 1.0, (None, None, y.data_ptr()), level)
    return y


def _call(
    x: Tensor,
    scale: Tensor | None,
    factors: Factors,
    shift: Tensor | None,
    group_size: int,
    clip_ratio: float,
    results: tuple[int | None, int | None, int | None],
    level: int | None,
) -> None:
    call(
        "kronecker_quantize_" + real(x),
        *(x.data_ptr(), ELEMENTS[x.dtype], pointer(scale), *factors[:2], pointer(shift), *factors[2:]),
        *(row_count(x), x.shape[-1], group_size, clip_ratio, *results),
        level=level,
    )
