"""`qpcompile::kv8_write` in standard ONNX operators; codes are bit-identical to the reference."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def kv8_write(x: Any) -> Any:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, D], affine: f32[B, H, S, 2]."""
    values = op.Cast(x, to=ir.DataType.FLOAT)
    low = op.Min(op.ReduceMin(values, [-1], keepdims=1), 0.0)
    span = op.Sub(op.Max(op.ReduceMax(values, [-1], keepdims=1), 0.0), low)
    scale = op.Div(span, 255.0)
    scale = op.Where(op.Equal(scale, 0.0), 1.0, scale)
    zero = op.Round(op.Div(op.Neg(low), scale))
    codes = op.Clip(op.Add(op.Round(op.Div(values, scale)), zero), 0.0, 255.0)
    return op.Cast(codes, to=ir.DataType.UINT8), op.Concat(scale, zero, axis=-1)
