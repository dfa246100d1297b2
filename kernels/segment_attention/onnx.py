"""qpcompile::segment_attention in standard ONNX operators, by an explicit mask: ONNX has no ragged attention.

The runner of an ONNX folder encodes one picture at a time, so that the mask is only as large as one picture's.
"""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.attention_kv.onnx import group_rows, masked_scores, scaled_queries
from qpcompile.kernels.sums_onnx import wide_type

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def segment_attention(q: Any, k: Any, v: Any, cu_seqlens: Any, scale: float) -> Any:
    """q: f[1, Hq, T, D], k: f[1, Hkv, T, D], v: f[1, Hkv, T, Dv], cu_seqlens: i[S + 1] -> q.dtype[1, Hq, T, Dv]."""
    heads, groups, width = q.shape[1], k.shape[1], q.shape[3]
    grouped = heads != groups
    wide = wide_type(q)
    queries = scaled_queries(q, scale, wide)
    keys, values = (op.Cast(each, to=wide) for each in (k, v))
    rows = group_rows(queries, groups, width) if grouped else queries
    products = op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2]))
    scores = op.Reshape(products, [1, heads, -1, 0]) if grouped else products
    weights = op.Softmax(masked_scores(scores, same_segment(q, cu_seqlens), wide), axis=-1)
    weights = op.Reshape(weights, [1, groups, -1, 0]) if grouped else weights
    y = op.MatMul(weights, values)
    y = op.Reshape(y, [1, heads, -1, v.shape[3]]) if grouped else y
    return op.Cast(y, to=q.dtype)


def same_segment(q: Any, cu_seqlens: Any) -> Any:
    """bool[T, T]: whether query i and key j are in the same segment."""
    position = op.Range(0, op.Squeeze(op.Shape(q, start=2, end=3)), 1)
    ends = op.Slice(op.Cast(cu_seqlens, to=ir.DataType.INT64), [1], [2**62], [0])
    passed = op.GreaterOrEqual(op.Unsqueeze(position, [1]), op.Unsqueeze(ends, [0]))
    segment = op.ReduceSum(op.Cast(passed, to=ir.DataType.INT64), [1], keepdims=0)
    same = op.Equal(op.Unsqueeze(segment, [1]), op.Unsqueeze(segment, [0]))
    same.dtype = ir.DataType.BOOL
    return same
