"""qpcompile::quantize_static in standard ONNX operators: Div, Round, Clip, and the scale broadcast over tokens."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.quantize_dynamic.onnx import rounded

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def quantize_static(x: Any, scale: Any, bits: int) -> tuple[Any, Any]:
    """x: f[..., C], scale: f32[1] or f32[..., 1] -> q: i8[..., C], scale: f32[..., 1]."""
    values = op.Cast(x, to=ir.DataType.FLOAT)
    sizes = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[1]), axis=0)
    return rounded(values, scale, bits), op.Expand(scale, sizes)
