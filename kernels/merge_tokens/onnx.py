"""`qpcompile::merge_tokens` in standard ONNX operators: a product with one [S, S] weight matrix."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.dpp_select.onnx import double, unit_rows

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def merge_tokens(hidden: Any, keys: Any, weights: Any, targets: Any, sources: Any, nearest: int) -> Any:
    """hidden: f[B, S, C], keys: f[B, S, K], weights: f32[B, S], targets, sources: bool[B, S] -> f[B, S, C]."""
    values, units = op.Cast(hidden, to=ir.DataType.DOUBLE), unit_rows(keys)
    similarity = op.Cast(op.MatMul(units, op.Transpose(units, perm=[0, 2, 1])), to=ir.DataType.FLOAT)
    if nearest:
        weight = op.Unsqueeze(op.Cast(weights, to=ir.DataType.DOUBLE), [1])
        shares = op.Mul(_of_nearest(similarity, sources, nearest), weight)
    else:
        joined = _of_closest(similarity, targets, sources)
        shares = op.Div(joined, op.Max(op.ReduceSum(joined, [2], keepdims=1), double(1.0)))
    merged = op.Add(values, op.MatMul(shares, values))
    return op.Cast(op.Where(op.Unsqueeze(targets, [2]), merged, values), to=hidden.dtype)


def _of_closest(similarity: Any, targets: Any, sources: Any) -> Any:
    """f64[B, S, S] of 0 and 1, as in reference.py."""
    among = op.Where(op.Unsqueeze(targets, [2]), similarity, float("-inf"))
    closest = op.ArgMax(among, axis=1, keepdims=1)
    rows = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(similarity, start=1, end=2)), 1), [1])
    return op.Cast(op.And(op.Equal(rows, closest), op.Unsqueeze(sources, [1])), to=ir.DataType.DOUBLE)


def _of_nearest(similarity: Any, sources: Any, nearest: int) -> Any:
    """f64[B, S, S] of 0 and 1, as in reference.py."""
    length = op.Shape(similarity, start=1, end=2)
    rows = op.Range(0, op.Squeeze(length), 1)
    itself = op.Equal(op.Unsqueeze(rows, [0]), op.Unsqueeze(rows, [1]))
    among = op.Where(op.And(op.Unsqueeze(sources, [1]), op.Not(itself)), similarity, float("-inf"))
    found, order = op.TopK(among, op.Min(length, op.Constant(value_ints=[nearest])), axis=2, largest=1, sorted=1)
    ones = op.Cast(op.Greater(found, float("-inf")), to=ir.DataType.DOUBLE)
    nothing = op.Mul(op.Cast(similarity, to=ir.DataType.DOUBLE), double(0.0))
    return op.ScatterElements(nothing, order, ones, axis=2)
