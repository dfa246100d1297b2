"""`qpcompile::dpp_select` as an ONNX Loop, one selected token per iteration, in float64.

A graph exported at opset 21 is built at opset 18 and converted; a function that contains a Loop is inlined before the
conversion and must therefore be written in opset 18.
"""

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import FLOAT, opset18, opset21

from qpcompile.kernels.dpp_select.reference import RANK_FLOOR, TINY

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
loop: Any = opset18


@onnxscript.script()
def greedy_map(unit, weight, gain, floor, priority, turns, tiny) -> FLOAT[...]:  # noqa: ANN001
    """unit: f64[B, S, C], weight, gain: f64[B, S], floor: f64[B, 1], priority: f32[B, S], turns: i64, tiny: f64."""
    last, middle = loop.Constant(value_ints=[2]), loop.Constant(value_ints=[1])
    length = loop.Shape(priority, start=1, end=2)
    places = loop.Range(0, loop.Squeeze(length), 1)
    # The leading zero keeps products with the basis from being empty in the first iteration.
    basis = loop.Unsqueeze(weight * 0.0, middle)
    for i in range(turns):
        best = loop.ArgMax(loop.Cast(gain, to=1), axis=1, keepdims=1)
        hot = places == best
        peak = loop.GatherElements(gain, best, axis=1)
        picks = peak > floor
        mark = loop.Unsqueeze(loop.CastLike(hot, unit), last)
        chosen = loop.MatMul(loop.Transpose(unit, perm=[0, 2, 1]), mark)
        row = loop.Squeeze(loop.MatMul(unit, chosen), last) * weight * loop.GatherElements(weight, best, axis=1)
        before = loop.Transpose(loop.MatMul(basis, mark), perm=[0, 2, 1])
        seen = loop.Squeeze(loop.MatMul(before, basis), middle)
        part = (row - seen) / loop.Sqrt(loop.Max(peak, tiny))
        step = loop.Where(picks, part, row * 0.0)
        basis = loop.Concat(basis, loop.Unsqueeze(step, middle), axis=1)
        taken = loop.And(picks, hot)
        out = loop.CastLike(loop.Constant(value_float=float("-inf")), gain)
        gain = loop.Where(taken, out, gain - step * step)
        priority = loop.Where(taken, loop.CastLike(length - i, priority), priority)
    return priority


def dpp_select(features: Any, relevance: Any, counted: Any, budget: Any) -> Any:
    """features: f[B, S, C], relevance: f32[B, S], counted: bool[B, S], budget: i64[B] -> f32[B, S]."""
    unit = unit_rows(features)
    zero, lowest = double(0.0), double(float("-inf"))
    weight = op.Where(counted, op.Cast(relevance, to=ir.DataType.DOUBLE), zero)
    norms = op.ReduceSumSquare(unit, [2], keepdims=0)
    gain = op.Where(counted, op.Mul(op.Mul(weight, weight), norms), lowest)
    floor = op.Mul(op.ReduceMax(gain, [1], keepdims=1), double(RANK_FLOOR))
    top = op.ReduceMax(op.Where(counted, relevance, float("-inf")), [1], keepdims=1)
    priority = op.Where(counted, op.Sub(relevance, top), 0.0)
    return greedy_map(unit, weight, gain, floor, priority, largest_turn(counted, budget), double(TINY))


def double(number: float) -> Any:
    """A float64 constant."""
    return op.Constant(value=ir.tensor(number, dtype=ir.DataType.DOUBLE))


def unit_rows(features: Any) -> Any:
    """f[B, S, C] -> f64[B, S, C], each row divided by its L2 norm; zero rows are unchanged."""
    wide = op.Cast(features, to=ir.DataType.DOUBLE)
    return op.Div(wide, op.Max(op.ReduceL2(wide, [2], keepdims=1), double(TINY)))


def largest_turn(counted: Any, budget: Any) -> Any:
    """counted: bool[B, S], budget: i64[B] -> i64[], the number of iterations of the row with the largest budget."""
    own = op.ReduceSum(op.Cast(counted, to=ir.DataType.INT64), [1], keepdims=0)
    return op.ReduceMax(op.Min(budget, own), [0], keepdims=0)
