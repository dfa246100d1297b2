"""Rows of tensors that are views of wider ones, as merged linears leave them: read by their stride, without a copy."""

from __future__ import annotations

from torch import Tensor


def in_rows(x: Tensor) -> Tensor:
    """x: [..., C] itself if its rows lie a constant number of elements apart, else a contiguous copy."""
    return x if row_stride(x) is not None else x.contiguous()


def row_stride(x: Tensor) -> int | None:
    """Elements from one row of x: [..., C] to the next; None if that is not constant, or a row is not contiguous."""
    if x.is_contiguous():
        return x.shape[-1] if x.dim() else 1
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    stride, rows = 0, 1
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != stride * rows:
            return None
        rows *= size
    return stride
