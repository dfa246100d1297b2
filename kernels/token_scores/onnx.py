"""`qpcompile::token_scores` in standard ONNX operators; its attention is blocked over rows, see onnx_attention.py."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.hadamard.onnx import rotated
from qpcompile.kernels.quantize_dynamic.onnx import quantize_values
from qpcompile.kernels.token_scores.normalize import EPSILON, LIMIT, MAD_TO_SIGMA
from qpcompile.kernels.token_scores.onnx_attention import attention_terms
from qpcompile.kernels.token_scores.settings import Attention, Tokens

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def token_scores(
    hidden: Any,
    rounded: Any,
    q: Any,
    k: Any,
    mask: Any,
    scale: float,
    visual: Any,
    valid: Any,
    queries: Any,
    weights: Sequence[float],
    normalize: str,
    low: float,
    high: float,
    intra_mean: bool,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
    bits: int,
    relative: bool,
    sink: float,
) -> Any:
    """hidden: f[B, S, C], rounded: f[B, S, D], q: f[B, H, S, E], k: f[B, Hkv, S, E] -> f32[B, S]; see reference.py."""
    counted = op.And(visual, valid)
    asked = {name for name, weight in (("inter", weights[0]), ("intra", weights[2])) if weight}
    tokens = Tokens(visual, valid, queries)
    attention = attention_terms(Attention(q, k, mask, scale), tokens, asked, intra_mean)
    magnitude = lost = None
    if weights[1]:
        magnitude = op.ReduceL2(_without_sinks(hidden, counted, sink), [-1], keepdims=0)
    if weights[3]:
        lost = _residual(
            _without_sinks(rounded, counted, sink), rounded.shape, rotate, group_size, clip_ratio, bits, relative
        )
    score: Any = 0.0
    metrics = (attention.get("inter"), magnitude, attention.get("intra"), lost)
    for weight, metric in zip(weights, metrics, strict=True):
        if metric is not None:
            score = op.Add(op.Mul(_normalize(metric, counted, normalize, low, high), weight), score)
    others = op.Where(valid, op.Constant(value_float=float("inf")), op.Constant(value_float=float("-inf")))
    return op.Where(counted, score, others)


def _without_sinks(tensor: Any, counted: Any, sink: float) -> Any:
    """tensor: f[B, S, C] of known C, counted: bool[B, S] -> f32[B, S, C]."""
    values = op.Cast(tensor, to=ir.DataType.FLOAT)
    if not sink:
        return values
    channels = tensor.shape[-1]
    peak = op.ReduceMax(op.Where(op.Unsqueeze(counted, [2]), op.Abs(values), 0.0), [1], keepdims=0)
    ordered, _ = op.TopK(peak, op.Constant(value_ints=[channels]), axis=1, largest=0, sorted=1)
    middle = op.Slice(ordered, [channels // 2], [channels // 2 + 1], [1])
    return op.Where(op.Unsqueeze(op.Greater(peak, op.Mul(middle, sink)), [1]), 0.0, values)


def _residual(
    values: Any, shape: ir.Shape, rotate: bool, group_size: int, clip_ratio: float, bits: int, relative: bool
) -> Any:
    """values: f32[B, S, C] of the given shape -> f32[B, S]."""
    values = rotated(values, shape, ir.DataType.DOUBLE) if rotate else values
    codes, scale = quantize_values(values, shape, group_size, clip_ratio, bits)
    codes = op.Cast(codes, to=ir.DataType.FLOAT)
    if groups := group_size and shape[-1] // group_size:
        parts = op.Mul(op.Reshape(codes, [0, 0, groups, group_size]), op.Reshape(scale, [0, 0, groups, 1]))
        restored = op.Reshape(parts, [0, 0, shape[-1]])
    else:
        restored = op.Mul(codes, scale)
    lost = op.ReduceL2(op.Sub(restored, values), [-1], keepdims=0)
    return op.Div(lost, op.Add(op.ReduceL2(values, [-1], keepdims=0), EPSILON)) if relative else lost


def _normalize(metric: Any, counted: Any, method: str, low: float, high: float) -> Any:
    """metric: f32[B, S], counted: bool[B, S] -> f32[B, S], as in normalize.py."""
    if method == "none":
        return metric
    if method == "rank":
        return _mean_rank(metric, counted)
    last = op.Max(op.Sub(_count(counted), 1), 0)
    if method == "percentile":
        ordered = _ordered(metric, counted)
        bottom, top = _percentile(ordered, last, low), _percentile(ordered, last, high)
        width = op.Add(op.Sub(top, bottom), EPSILON)
        return op.Clip(op.Div(op.Sub(metric, bottom), width), 0.0, 1.0)
    distance = op.Sub(metric, _percentile(_ordered(metric, counted), last, 50))
    spread = _percentile(_ordered(op.Abs(distance), counted), last, 50)
    sigma = op.Add(op.Mul(spread, MAD_TO_SIGMA), EPSILON)
    return op.Div(op.Add(op.Clip(op.Div(distance, sigma), -LIMIT, LIMIT), LIMIT), 2 * LIMIT)


def _count(counted: Any) -> Any:
    """counted: bool[B, S] -> i64[B, 1]."""
    return op.ReduceSum(op.Cast(counted, to=ir.DataType.INT64), [1], keepdims=1)


def _ordered(metric: Any, counted: Any) -> Any:
    """metric: f32[B, S] -> the counted entries of each row in ascending order, then infinities: f32[B, S]."""
    entries = op.Where(counted, metric, float("inf"))
    values, _ = op.TopK(entries, op.Shape(metric, start=1, end=2), axis=1, largest=0, sorted=1)
    return values


def _percentile(ordered: Any, last: Any, percent: float) -> Any:
    """ordered: f32[B, S], last: i64[B, 1], the index of the largest counted entry -> f32[B, 1]."""
    position = op.Mul(op.Cast(last, to=ir.DataType.FLOAT), percent / 100)
    floor = op.Floor(position)
    below = op.Cast(floor, to=ir.DataType.INT64)
    value = op.GatherElements(ordered, below, axis=1)
    above = op.GatherElements(ordered, op.Min(op.Add(below, 1), last), axis=1)
    return op.Add(value, op.Mul(op.Sub(above, value), op.Sub(position, floor)))


def _mean_rank(metric: Any, counted: Any) -> Any:
    """metric: f32[B, S] -> f32[B, S] in 0..1, by comparing all pairs: ONNX has no search in a sorted row."""
    mine, others = op.Unsqueeze(metric, [2]), op.Unsqueeze(metric, [1])
    among = op.Unsqueeze(counted, [1])
    smaller, not_larger = (
        op.ReduceSum(op.Cast(op.And(among, compare(others, mine)), to=ir.DataType.FLOAT), [2], keepdims=0)
        for compare in (op.Less, op.LessOrEqual)
    )
    rank = op.Div(op.Sub(op.Add(smaller, not_larger), 1.0), 2.0)
    return op.Div(rank, op.Cast(op.Max(op.Sub(_count(counted), 1), 1), to=ir.DataType.FLOAT))
