"""qpcompile::attention_received in standard ONNX operators; without a class token it materializes [T, T]."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.attention_kv.onnx import group_rows, masked_scores
from qpcompile.kernels.segment_attention.onnx import same_segment

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def attention_received(q: Any, k: Any, cu_seqlens: Any, scale: float, class_token: bool) -> Any:
    """q: f[B, Hq, T, D], k: f[B, Hkv, T, D], cu_seqlens: i[S + 1] or None -> f32[B, T]."""
    heads, groups = q.shape[1], k.shape[1]
    queries = op.Mul(op.Cast(q, to=ir.DataType.FLOAT), scale)
    if class_token:
        queries = op.Slice(queries, [0], [1], [2])
    keys = op.Transpose(op.Cast(k, to=ir.DataType.FLOAT), perm=[0, 1, 3, 2])
    if heads == groups:
        scores = op.MatMul(queries, keys)
    else:
        shape = op.Concat(op.Shape(queries, start=0, end=3), op.Constant(value_ints=[-1]), axis=0)
        scores = op.Reshape(op.MatMul(group_rows(queries, groups, q.shape[3]), keys), shape)
    if cu_seqlens is not None:
        scores = masked_scores(scores, same_segment(q, cu_seqlens), ir.DataType.FLOAT)
    attention = op.ReduceMean(op.Softmax(scores, axis=-1), [1], keepdims=0)
    return op.ReduceSum(attention, [1], keepdims=0)
