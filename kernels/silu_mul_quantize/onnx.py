"""qpcompile::silu_mul_quantize in standard ONNX operators."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.hadamard.onnx import transform
from qpcompile.kernels.quantize_int4.onnx import quantize_values

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def silu_mul_quantize(
    gate: Any, up: Any, transform_scale: Any, rotate: bool, group_size: int, clip_ratio: float
) -> tuple[Any, Any]:
    """gate, up: f[..., C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    assert gate.shape is not None
    values = op.Cast(gate, to=ir.DataType.DOUBLE)
    values = op.Mul(op.Mul(values, op.Sigmoid(values)), op.Cast(up, to=ir.DataType.DOUBLE))
    values = op.Cast(values, to=ir.DataType.FLOAT)
    return quantize_values(transform(values, transform_scale, rotate, gate.shape), gate.shape, group_size, clip_ratio)
