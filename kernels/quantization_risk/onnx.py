"""`qpcompile::quantization_risk` in standard ONNX operators, in float64."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.dpp_select.onnx import double
from qpcompile.kernels.quantization_risk.reference import LARGEST_CODE, MARGIN, clip_position
from qpcompile.kernels.text_relevance.onnx import plus, rescale

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def quantization_risk(features: Any, counted: Any, metric: str, group_size: int) -> Any:
    """features: f[B, S, C], counted: bool[B, S] -> f32[B, S]."""
    v, width = op.Cast(features, to=ir.DataType.DOUBLE), features.shape[2]
    if metric in ("complex", "complex_l1"):
        relative = _minmax if metric == "complex" else _share
        error, spread = relative(_group_error(v, width, group_size), counted), relative(_range(v), counted)
        risk = op.Mul(op.Add(error, spread), double(0.5))
    else:
        risk = _minmax(_measures(v, width, group_size)[metric](), counted)
    return op.Cast(risk, to=ir.DataType.FLOAT)


def _measures(v: Any, width: int, group_size: int) -> dict[str, Callable[[], Any]]:
    """The function that computes each metric, f64[B, S], of v: f64[B, S, width]."""
    return {
        "complex_mul": lambda: op.Mul(_group_error(v, width, group_size), _range(v)),
        "l2_norm": lambda: _norm(v),
        "l1_norm": lambda: op.ReduceSum(op.Abs(v), [2], keepdims=0),
        "l_inf": lambda: op.ReduceMax(op.Abs(v), [2], keepdims=0),
        "variance": lambda: _variance(v),
        "dynamic_range": lambda: _range(v),
        "quant_error": lambda: _group_error(v, width, width),
        "quant_error_clip": lambda: _clipped_error(v, width),
        "quant_error_group": lambda: _group_error(v, width, group_size),
    }


def _group_error(v: Any, width: int, group_size: int) -> Any:
    size = min(group_size, width)
    padded = op.Pad(v, op.Constant(value_ints=[0, 0, 0, 0, 0, -width % size]))
    groups = op.Reshape(padded, op.Constant(value_ints=[0, 0, -1, size]))
    top = op.ReduceMax(op.Abs(groups), [3], keepdims=1)
    lost = op.Sub(groups, _rounded(groups, top))
    return op.Sqrt(op.ReduceSumSquare(lost, [2, 3], keepdims=0))


def _clipped_error(v: Any, width: int) -> Any:
    below, above, part = clip_position(width)
    ordered, _ = op.TopK(op.Abs(v), op.Constant(value_ints=[width]), axis=2, largest=0, sorted=1)
    low, high = (op.Slice(ordered, [at], [at + 1], [2]) for at in (below, above))
    top = op.Add(low, op.Mul(op.Sub(high, low), double(part)))
    return _norm(op.Sub(v, _rounded(op.Min(op.Max(v, op.Neg(top)), top), top)))


def _rounded(v: Any, top: Any) -> Any:
    scale = op.Div(top, double(LARGEST_CODE))
    return op.Mul(op.Round(op.Div(v, plus(scale, MARGIN))), scale)


def _norm(v: Any) -> Any:
    return op.Sqrt(op.ReduceSumSquare(v, [2], keepdims=0))


def _variance(v: Any) -> Any:
    away = op.Sub(v, op.ReduceMean(v, [2], keepdims=1))
    return op.ReduceMean(op.Mul(away, away), [2], keepdims=0)


def _range(v: Any) -> Any:
    return op.Sub(op.ReduceMax(v, [2], keepdims=0), op.ReduceMin(v, [2], keepdims=0))


def _minmax(values: Any, counted: Any) -> Any:
    return rescale(values, counted, MARGIN)


def _share(values: Any, counted: Any) -> Any:
    own = op.Where(counted, values, double(0.0))
    return op.Div(own, plus(op.ReduceSum(own, [1], keepdims=1), MARGIN))
