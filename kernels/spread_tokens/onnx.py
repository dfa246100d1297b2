"""`qpcompile::spread_tokens` in standard ONNX operators; onnxruntime's TopK breaks ties by the lower index."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def spread_tokens(scores: Any, counted: Any, budget: Any, share: float) -> Any:
    """scores: f32[B, S], counted: bool[B, S], budget: i64[B] -> f32[B, S]."""
    flags = op.Cast(counted, to=ir.DataType.INT64)
    total = op.ReduceSum(flags, [1], keepdims=1)
    keep = op.Min(op.Unsqueeze(budget, [1]), total)
    part, half = (op.Constant(value=ir.tensor(each, dtype=ir.DataType.DOUBLE)) for each in (share, 0.5))
    wanted = op.Add(op.Mul(op.Cast(keep, to=ir.DataType.DOUBLE), part), half)
    spread = op.Cast(op.Floor(wanted), to=ir.DataType.INT64)
    length = op.Shape(scores, start=1, end=2)
    _, order = op.TopK(op.Where(counted, scores, float("-inf")), length, axis=1, largest=1, sorted=1)
    _, rank = op.TopK(order, length, axis=1, largest=0, sorted=1)
    best_count = op.Sub(keep, spread)
    best = op.And(counted, op.Less(rank, best_count))
    rest = op.And(counted, op.Not(best))
    place = op.Max(op.Sub(op.CumSum(op.Cast(rest, to=ir.DataType.INT64), 1), 1), 0)
    others = op.Max(op.Sub(total, best_count), 1)
    after, before = (_ceil_div(op.Mul(each, spread), others) for each in (op.Add(place, 1), place))
    spaced = op.And(rest, op.Greater(after, before))
    return op.Add(op.Mul(op.Cast(best, to=ir.DataType.FLOAT), 2.0), op.Cast(spaced, to=ir.DataType.FLOAT))


def _ceil_div(value: Any, divisor: Any) -> Any:
    """Of i64, value >= 0 and divisor > 0."""
    return op.Div(op.Sub(op.Add(value, divisor), 1), divisor)
