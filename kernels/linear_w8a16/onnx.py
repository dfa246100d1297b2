"""qpcompile::linear_w8a16 in standard ONNX operators: an 8-bit initializer, cast, multiplied and scaled.

onnxruntime folds the cast to float32 when it loads the model. It would fuse DequantizeLinear and MatMul into its own
MatMulNBits, which with floating-point activations takes 165 ms on one row of 1024 and 32,000 outputs; this takes 11 ms.
"""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def linear_w8a16(x: Any, weight: Any, weight_scale: Any, bias: Any = None) -> Any:
    """x: f[..., K], weight: i8[N, K], weight_scale: f32[N, 1], bias: f[N] -> x.dtype[..., N]."""
    wide = x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)
    codes = op.Transpose(op.Cast(weight, to=ir.DataType.FLOAT), perm=[1, 0])
    y = op.Mul(op.MatMul(wide, codes), op.Squeeze(weight_scale, [1]))
    y = y if bias is None else op.Add(y, op.Cast(bias, to=ir.DataType.FLOAT))
    return y if wide is x else op.Cast(y, to=x.dtype)
