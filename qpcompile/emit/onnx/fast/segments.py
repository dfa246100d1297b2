"""Block-diagonal attention over segments (kernels/segment_attention) by onnxruntime's MultiHeadAttention.

Without a mask that is blocked over queries and keys, and never materializes a T x T matrix.

Segments of equal length form a batch: the one picture of a tower without windows, frames, most windows. Others run one
by one, in a Loop.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import FLOAT, opset18, opset21
from onnxscript.values import Opset

from qpcompile.kernels.segment_attention.onnx import segment_attention as plain_segments

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
loop: Any = opset18  # as in dpp_select/onnx.py
contrib: Any = Opset("com.microsoft", 1)


@onnxscript.script()
def attention_in_segments(query, key, value, starts, ends, heads: int, scale: float) -> FLOAT[...]:  # noqa: ANN001
    """query, key, value: f32[1, T, C], starts, ends: i64[S], no segment empty -> f32[1, T, C].

    The checker of models knows no operator of onnxruntime's, so a cast that does nothing says what type each returns.
    """
    lengths = ends - starts
    count = loop.Shape(ends)
    axis = loop.Constant(value_ints=[1])
    if loop.ReduceMax(lengths, keepdims=0) == loop.ReduceMin(lengths, keepdims=0):
        batch = loop.Concat(count, loop.Constant(value_ints=[-1]), loop.Shape(query, start=2, end=3), axis=0)
        rows, keys, values = loop.Reshape(query, batch), loop.Reshape(key, batch), loop.Reshape(value, batch)
        made = loop.Cast(contrib.MultiHeadAttention(rows, keys, values, num_heads=heads, scale=scale), to=1)
        y = loop.Reshape(made, loop.Shape(query))
    else:
        parts = loop.SequenceEmpty(dtype=1)
        for i in range(loop.Squeeze(count)):
            at = loop.Reshape(i, axis)
            start, end = loop.Gather(starts, at), loop.Gather(ends, at)
            rows, keys = loop.Slice(query, start, end, axis), loop.Slice(key, start, end, axis)
            values = loop.Slice(value, start, end, axis)
            part = loop.Cast(contrib.MultiHeadAttention(rows, keys, values, num_heads=heads, scale=scale), to=1)
            parts = loop.SequenceInsert(parts, part)
        y = loop.ConcatFromSequence(parts, axis=1)
    return y


def segment_attention(q: Any, k: Any, v: Any, cu_seqlens: Any, scale: float) -> Any:
    """q, k, v: f32[1, H, T, D], cu_seqlens: i[S + 1] -> f32[1, H, T, D]; the standard one for grouped heads."""
    heads, width = q.shape[1], q.shape[3]
    if (k.shape[1], v.shape[3]) != (heads, width):
        return plain_segments(q, k, v, cu_seqlens, scale)
    query, key, value = (op.Reshape(op.Transpose(each, perm=[0, 2, 1, 3]), [0, 0, heads * width]) for each in (q, k, v))
    # An empty segment ends where its neighbour does.
    places = op.Unique(op.Cast(cu_seqlens, to=ir.DataType.INT64), sorted=1)
    starts, ends = op.Slice(places, [0], [-1], [0]), op.Slice(places, [1], [2**62], [0])
    y = attention_in_segments(query, key, value, starts, ends, heads, float(scale))
    return op.Transpose(op.Reshape(y, [0, 0, heads, width]), perm=[0, 2, 1, 3])
