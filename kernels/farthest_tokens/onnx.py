"""`qpcompile::farthest_tokens` as an ONNX Loop over selected tokens, in float64; opset 18 as in dpp_select/onnx.py."""

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import FLOAT, opset18, opset21

from qpcompile.kernels.dpp_select.onnx import double, largest_turn, unit_rows

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
loop: Any = opset18


@onnxscript.script()
def greedy_spread(unit, near, free, priority, turns) -> FLOAT[...]:  # noqa: ANN001
    """unit: f64[B, S, C], near: f64[B, S], free: bool[B, S], priority: f32[B, S], turns: i64."""
    last = loop.Constant(value_ints=[2])
    never = loop.Constant(value_float=float("-inf"))
    length = loop.Shape(priority, start=1, end=2)
    places = loop.Range(0, loop.Squeeze(length), 1)
    for i in range(turns):
        apart = loop.Where(free, loop.Neg(loop.Cast(near, to=1)), never)
        best = loop.ArgMax(apart, axis=1, keepdims=1)
        hot = places == best
        taken = loop.And(hot, free)
        free = loop.And(free, loop.Not(hot))
        priority = loop.Where(taken, loop.CastLike(length - i, priority), priority)
        mark = loop.Unsqueeze(loop.CastLike(hot, unit), last)
        chosen = loop.MatMul(loop.Transpose(unit, perm=[0, 2, 1]), mark)
        cosine = loop.Squeeze(loop.MatMul(unit, chosen), last)
        near = loop.Where(i == 0, cosine, loop.Max(near, cosine))
    return priority


def farthest_tokens(features: Any, counted: Any, budget: Any) -> Any:
    """features: f[B, S, C], counted: bool[B, S], budget: i64[B] -> f32[B, S]."""
    unit = unit_rows(features)
    cosines = op.MatMul(unit, op.Transpose(unit, perm=[0, 2, 1]))
    places = op.Range(0, op.Squeeze(op.Shape(counted, start=1, end=2)), 1)
    others = op.And(op.Unsqueeze(counted, [1]), op.Not(op.Equal(places, op.Unsqueeze(places, [1]))))
    near = op.ReduceMax(op.Where(others, cosines, double(float("-inf"))), [2], keepdims=0)
    priority = op.Mul(op.Cast(counted, to=ir.DataType.FLOAT), 0.0)
    return greedy_spread(unit, near, counted, priority, largest_turn(counted, budget))
