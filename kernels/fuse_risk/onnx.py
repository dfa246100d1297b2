"""`qpcompile::fuse_risk` in standard ONNX operators, in float64."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.dpp_select.onnx import double
from qpcompile.kernels.fuse_risk.reference import CALM, DEPTH, MARGIN, SPAN
from qpcompile.kernels.text_relevance.onnx import plus, rescale

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def fuse_risk(scores: Any, risk: Any, counted: Any, alpha: float, dynamic: bool, minmax: bool) -> Any:
    """scores, risk: f32[B, S], counted: bool[B, S] -> f32[B, S]."""
    ours, theirs = (op.Cast(each, to=ir.DataType.DOUBLE) for each in (scores, risk))
    base = rescale(ours, counted, MARGIN) if minmax else ours
    share = _dynamic_alpha(theirs, counted, alpha) if dynamic else double(alpha)
    fused = op.Add(op.Mul(base, share), op.Mul(theirs, op.Sub(double(1.0), share)))
    return op.Cast(op.Where(counted, fused, ours), to=ir.DataType.FLOAT)


def _dynamic_alpha(risk: Any, counted: Any, alpha: float) -> Any:
    """risk: f64[B, S], counted: bool[B, S] -> f64[B, 1]."""
    zero, one = double(0.0), double(1.0)
    count = op.ReduceSum(op.Cast(counted, to=ir.DataType.DOUBLE), [1], keepdims=1)
    mean = op.Div(op.ReduceSum(op.Where(counted, risk, zero), [1], keepdims=1), op.Max(count, one))
    away = op.Sub(risk, mean)
    squares = op.ReduceSum(op.Where(counted, op.Mul(away, away), zero), [1], keepdims=1)
    deviation = op.Sqrt(op.Div(squares, op.Max(op.Sub(count, one), one)))
    spread = op.Div(deviation, plus(mean, MARGIN))
    excess = op.Min(op.Max(op.Div(op.Sub(spread, double(CALM)), double(SPAN)), zero), one)
    return op.Sub(double(alpha), op.Mul(excess, double(DEPTH)))
