"""`qpcompile::text_relevance` in standard ONNX operators, in float64."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.dpp_select.onnx import double, unit_rows
from qpcompile.kernels.text_relevance.reference import MARGIN

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def text_relevance(hidden: Any, visual: Any, valid: Any, sign: int) -> Any:
    """hidden: f[B, S, C], visual, valid: bool[B, S] -> f32[B, S]."""
    counted = op.And(visual, valid)
    unit = unit_rows(hidden)
    begun = op.Greater(op.CumSum(op.Cast(counted, to=ir.DataType.INT64), 1), 0)
    text = op.Cast(op.And(op.And(valid, op.Not(visual)), begun), to=ir.DataType.DOUBLE)
    count = op.Max(op.ReduceSum(text, [1], keepdims=1), double(1.0))
    mean = op.Div(op.MatMul(op.Unsqueeze(text, [1]), unit), op.Unsqueeze(count, [2]))
    cosine = op.Squeeze(op.MatMul(unit, op.Transpose(mean, perm=[0, 2, 1])), [2])
    return op.Cast(rescale(op.Mul(cosine, double(sign)), counted, MARGIN), to=ir.DataType.FLOAT)


def rescale(values: Any, counted: Any, margin: float) -> Any:
    """values: f64[B, S], counted: bool[B, S] -> f64[B, S], as in reference.py."""
    low = op.ReduceMin(op.Where(counted, values, double(float("inf"))), [1], keepdims=1)
    high = op.ReduceMax(op.Where(counted, values, double(float("-inf"))), [1], keepdims=1)
    part = op.Div(plus(op.Sub(values, low), margin), plus(op.Sub(high, low), margin))
    return op.Where(counted, part, double(0.0))


def plus(values: Any, margin: float) -> Any:
    """values: f64 -> values + margin, written so that exporters' simplifications do not treat 1e-8 as zero."""
    return op.Mul(op.Add(op.Div(values, double(margin)), double(1.0)), double(margin))
