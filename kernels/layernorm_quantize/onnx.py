"""qpcompile::layernorm_quantize in standard ONNX operators."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.sums_onnx import constant, wide_type
from qpcompile.kernels.transform_quantize.onnx import quantized

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def layernorm_quantize(
    x: Any,
    weight: Any,
    bias: Any,
    eps: float,
    transform_scale: Any,
    rotate: bool,
    left: Any,
    right: Any,
    shift: Any,
    group_size: int,
    clip_ratio: float,
    bits: int,
) -> tuple[Any, Any]:
    """x: f[..., C], weight, bias: f[C] -> q: i8[..., C], scale: f32[..., G]."""
    assert x.shape is not None
    wide = wide_type(x)
    values = op.Cast(x, to=wide)
    values = op.Sub(values, op.ReduceMean(values, [-1], keepdims=1))
    mean = op.ReduceMean(op.Mul(values, values), [-1], keepdims=1)
    values = op.Div(values, op.Sqrt(op.Add(mean, constant(eps, wide))))
    values = op.Add(op.Mul(values, op.Cast(weight, to=wide)), op.Cast(bias, to=wide))
    values = op.Cast(values, to=ir.DataType.FLOAT)
    return quantized(values, x, transform_scale, rotate, left, right, shift, group_size, clip_ratio, bits)
