"""`qpcompile::pivot_tokens` unrolled over its pivots; onnxruntime's TopK breaks ties by the lower index."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.dpp_select.onnx import unit_rows

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def pivot_tokens(
    hidden: Any, keys: Any, visual: Any, valid: Any, budget: Any, visual_pivots: int, text_pivots: int
) -> Any:
    """hidden: f[B, S, C], keys: f[B, H, S, D], visual, valid: bool[B, S], budget: i64[B] -> f32[B, S]."""
    counted = op.And(visual, valid)
    begun = op.Greater(op.CumSum(op.Cast(counted, to=ir.DataType.INT64), 1), 0)
    text = op.And(op.And(valid, op.Not(visual)), begun)
    wide = op.ReduceSum(op.Abs(op.Cast(keys, to=ir.DataType.DOUBLE)), [1, 3], keepdims=0)
    size = op.Cast(wide, to=ir.DataType.FLOAT)
    own = op.Min(op.Unsqueeze(budget, [1]), _count(counted))
    first, second = op.Min(own, visual_pivots), op.Min(_count(text), text_pivots)
    left, pivots = op.Sub(own, first), op.Max(op.Add(first, second), 1)
    each = op.Div(left, pivots)
    more = op.Sub(left, op.Mul(each, pivots))
    pictures, words = _falling(size, counted), _falling(size, text)
    slots = [(_nth(pictures, slot), slot, op.Greater(first, slot)) for slot in range(visual_pivots)]
    slots += [(_nth(words, slot), op.Add(first, slot), op.Greater(second, slot)) for slot in range(text_pivots)]

    unit = unit_rows(hidden)
    length = op.Shape(counted, start=1, end=2)
    places = op.Range(0, op.Squeeze(length), 1)
    score: Any = op.Mul(op.Cast(counted, to=ir.DataType.FLOAT), 0.0)
    for index, _, exists in slots[:visual_pivots]:
        score = op.Where(op.And(op.Equal(places, index), exists), 2.0, score)
    for index, ordinal, exists in slots:
        share = op.Where(exists, op.Add(each, op.Cast(op.Greater(more, ordinal), to=ir.DataType.INT64)), 0)
        mark = op.Unsqueeze(op.Cast(op.Equal(places, index), to=ir.DataType.DOUBLE), [2])
        chosen = op.MatMul(op.Transpose(unit, perm=[0, 2, 1]), mark)
        cosine = op.Cast(op.Squeeze(op.MatMul(unit, chosen), [2]), to=ir.DataType.FLOAT)
        free = op.And(counted, op.Equal(score, 0.0))
        _, order = op.TopK(op.Where(free, cosine, float("inf")), length, axis=1, largest=0, sorted=1)
        _, rank = op.TopK(order, length, axis=1, largest=0, sorted=1)
        score = op.Where(op.And(free, op.Less(rank, share)), 1.0, score)
    return score


def _count(mask: Any) -> Any:
    """mask: bool[B, S] -> i64[B, 1]."""
    return op.ReduceSum(op.Cast(mask, to=ir.DataType.INT64), [1], keepdims=1)


def _falling(size: Any, among: Any) -> Any:
    """size: f32[B, S], among: bool[B, S] -> i64[B, S], indices in descending order, those in `among` first."""
    _, order = op.TopK(op.Where(among, size, float("-inf")), op.Shape(size, start=1, end=2), axis=1)
    return order


def _nth(order: Any, slot: int) -> Any:
    """order: i64[B, S] -> i64[B, 1], entry number `slot`, or the last one if there are fewer."""
    return op.Gather(order, op.Min(op.Sub(op.Shape(order, start=1, end=2), 1), slot), axis=1)
