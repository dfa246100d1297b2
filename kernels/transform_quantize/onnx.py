"""qpcompile::transform_quantize in standard ONNX operators, and the epilogue of other translations."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.hadamard.onnx import rotated
from qpcompile.kernels.kronecker.onnx import changed
from qpcompile.kernels.quantize_dynamic.onnx import quantize_values
from qpcompile.kernels.sums_onnx import wide_type

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def transform_quantize(
    x: Any,
    transform_scale: Any,
    rotate: bool,
    left: Any,
    right: Any,
    shift: Any,
    group_size: int,
    clip_ratio: float,
    bits: int,
) -> tuple[Any, Any]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]. The rank and C of `x` must be known."""
    values = op.Cast(x, to=ir.DataType.FLOAT)
    return quantized(values, x, transform_scale, rotate, left, right, shift, group_size, clip_ratio, bits)


def quantized(
    values: Any,
    x: Any,
    transform_scale: Any,
    rotate: bool,
    left: Any,
    right: Any,
    shift: Any,
    group_size: int,
    clip_ratio: float,
    bits: int,
) -> tuple[Any, Any]:
    """values: f32[..., C], computed from x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    shape, wide = x.shape, wide_type(x)
    values = values if transform_scale is None else op.Mul(values, transform_scale)
    if left is not None and right is not None:
        values = changed(values, left, right, shape, wide)
    elif rotate:
        values = rotated(values, shape, wide)
    values = values if shift is None else op.Sub(values, shift)
    return quantize_values(values, shape, group_size, clip_ratio, bits)
