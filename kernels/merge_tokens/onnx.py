"""`qpcompile::merge_tokens` in plain ONNX operators: one [S, S] matrix says who adds what to whom."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
# torch divides by the norm or by this, whichever is larger.
SMALLEST_NORM = 1e-12


def merge_tokens(hidden: Any, keys: Any, weights: Any, targets: Any, sources: Any, nearest: int) -> Any:
    """hidden: f[B, S, C], keys: f[B, S, K], weights: f32[B, S], targets, sources: bool[B, S] -> f[B, S, C]."""
    values = op.Cast(hidden, to=ir.DataType.FLOAT)
    wide = op.Cast(keys, to=ir.DataType.FLOAT)
    units = op.Div(wide, op.Max(op.ReduceL2(wide, [-1], keepdims=1), SMALLEST_NORM))
    similarity = op.MatMul(units, op.Transpose(units, perm=[0, 2, 1]))
    if nearest:
        shares = op.Mul(_shares_of_nearest(similarity, sources, nearest), op.Unsqueeze(weights, [1]))
    else:
        shares = _shares_of_means(similarity, targets, sources)
    merged = op.Add(values, op.MatMul(shares, values))
    return op.Cast(op.Where(op.Unsqueeze(targets, [2]), merged, values), to=hidden.dtype)


def _shares_of_means(similarity: Any, targets: Any, sources: Any) -> Any:
    """f32[B, S, S], targets by rows."""
    among = op.Where(op.Unsqueeze(targets, [2]), similarity, float("-inf"))
    closest = op.ArgMax(among, axis=1, keepdims=1)
    rows = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(similarity, start=1, end=2)), 1), [1])
    joined = op.And(op.Equal(rows, closest), op.Unsqueeze(sources, [1]))
    shares = op.Cast(joined, to=ir.DataType.FLOAT)
    return op.Div(shares, op.Max(op.ReduceSum(shares, [2], keepdims=1), 1.0))


def _shares_of_nearest(similarity: Any, sources: Any, nearest: int) -> Any:
    """f32[B, S, S], tokens by rows, their sources by columns."""
    length = op.Shape(similarity, start=1, end=2)
    rows = op.Range(0, op.Squeeze(length), 1)
    itself = op.Equal(op.Unsqueeze(rows, [0]), op.Unsqueeze(rows, [1]))
    allowed = op.And(op.Unsqueeze(sources, [1]), op.Not(itself))
    among = op.Where(allowed, similarity, float("-inf"))
    found, order = op.TopK(among, op.Min(length, op.Constant(value_ints=[nearest])), axis=2, largest=1, sorted=1)
    ones = op.Cast(op.Greater(found, float("-inf")), to=ir.DataType.FLOAT)
    return op.ScatterElements(op.Mul(similarity, 0.0), order, ones, axis=2)
