"""`qpcompile::kv8_read` in standard ONNX operators; bit-identical to the reference."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def kv8_read(codes: Any, affine: Any, dtype: int) -> Any:
    """codes: u8[B, H, S, D], affine: f32[B, H, S, 2] -> dtype[B, H, S, D]."""
    scale, zero = op.Slice(affine, [0], [1], [-1]), op.Slice(affine, [1], [2], [-1])
    return op.Cast(op.Mul(op.Sub(op.Cast(codes, to=ir.DataType.FLOAT), zero), scale), to=dtype)
