"""CPU kernel of transform_quantize, and the epilogue of other CPU kernels: one C call, or torch in reused buffers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import Kind, RowPlan
from qpcompile.kernels.quantize_dynamic.cpu import quantize_dynamic
from qpcompile.kernels.sums import by_rows, wide_type
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments
from qpcompile.kernels.transform_quantize.rule import RULE


@RULE.checked
def transform_quantize(x: Tensor, *epilogue: *EpilogueArguments) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    end = Epilogue(*epilogue)
    return _native(x, end) if readable(end, x) else _torch(x, end)


def _native(x: Tensor, end: Epilogue, level: int | None = None) -> tuple[Tensor, Tensor]:
    return row_plan("plain", x, end, level).quantized(x)


def _torch(x: Tensor, end: Epilogue) -> tuple[Tensor, Tensor]:
    q, scale = by_rows(lambda rows: quantized(rows.float(), end, x), x)
    return q, scale


def readable(end: Epilogue, x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the C library can compute rows of x; tensors: the operator's other ones, without its epilogue's."""
    return native.computes(x, *tensors, end.transform_scale, end.left, end.right, end.shift)


def row_plan(kind: Kind, x: Tensor, end: Epilogue, level: int | None, **parameters: Any) -> RowPlan:
    """The operator in C for rows of `kind` of the type and width of x; parameters: those of the kind."""
    factors = end.rotate if end.left is None or end.right is None else (end.left, end.right)
    settings: dict[str, Any] = {"group_size": end.group_size, "clip_ratio": end.clip_ratio, "bits": end.bits}
    settings |= {"level": level, "scale": end.transform_scale, "factors": factors, "shift": end.shift}
    return RowPlan(kind, x.dtype, x.shape[-1], **parameters, **settings)


def quantized(rows: Tensor, end: Epilogue, x: Tensor) -> tuple[Tensor, Tensor]:
    """rows: f32[..., C], computed from x -> q: i8[..., C], scale: f32[..., G], by torch."""
    return quantize_dynamic(end.transformed(rows, wide_type(x)), end.group_size, end.clip_ratio, end.bits)
