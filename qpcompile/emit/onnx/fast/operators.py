"""Translations for `export_onnx(..., fast=True)`: onnxruntime's contrib operators, and float32 instead of float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import evaluator, opset21

from qpcompile.emit.onnx.fast.attention import (
    HEADROOM,
    WIDTHS,
    cached_attention,
    causal_attention,
    channel_codes,
    doubled_rope,
    open_attention,
)
from qpcompile.emit.onnx.fast.graphs import linear_w8
from qpcompile.emit.onnx.fast.inputs import embedding_16, rows_of_16_bits
from qpcompile.emit.onnx.fast.segments import segment_attention
from qpcompile.emit.onnx.record import Recorder
from qpcompile.emit.onnx.translate.attention import attention as plain_attention
from qpcompile.ir import operators
from qpcompile.ir.edit import aten
from qpcompile.kernels.hadamard.reference import factor_arrays

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export

CONTRIB = "com.microsoft"
# The bias of a masked key. Finite, because a fully masked row would be NaN.
HIDDEN = -1e30


def contrib(name: str, inputs: list[Any], outputs: int = 1, **attributes: Any) -> Any:
    """A node of onnxruntime's contrib domain; its inputs are values of the graph, None if omitted."""
    recorder = evaluator.default()
    assert isinstance(recorder, Recorder)
    return recorder.node(CONTRIB, name, inputs, attributes, outputs)


def blocks_of_8_bits(x: Any, codes: Any, scale: Any, bias: Any) -> Any:
    """The translation of `linear_w8`."""
    sizes = {"K": x.shape[-1], "N": codes.shape[0], "bits": 8, "block_size": codes.shape[2], "accuracy_level": 4}
    return contrib("MatMulNBits", [x, codes, scale, None, None, bias], **sizes)


def rmsnorm(x: Any, weight: Any, eps: float) -> Any:
    """x: f32[..., C], weight: f32[C] -> f32[..., C], in the pattern that onnxruntime fuses."""
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
    return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, eps))), weight)


def hadamard(x: Any, scale: Any = None) -> Any:
    """x: f32[..., C], scale: f32[C] -> f32[..., C]."""
    left, right = (op.Constant(value=ir.tensor(each.astype(np.float32))) for each in factor_arrays(x.shape[-1]))
    return kronecker(x, scale, left, right)


def kronecker(x: Any, scale: Any, left: Any, right: Any) -> Any:
    """x: f32[..., A*c], scale: f32[A*c], left: f32[A, A], right: f32[c, c] -> f32[..., A*c]."""
    leading = [0] * (len(x.shape) - 1)
    values = x if scale is None else op.Mul(x, scale)
    values = op.Reshape(values, [*leading, left.shape[0], right.shape[0]])
    values = op.MatMul(left, op.MatMul(values, right))
    return op.Reshape(values, [*leading, x.shape[-1]])


def codes_by_channel(x: Any) -> tuple[Any, Any]:
    """The translation of `channel_codes`."""
    scale = op.Mul(op.ReduceMax(op.Abs(x), [0, 2], keepdims=1), HEADROOM / 127)
    scale = op.Where(op.Equal(scale, 0.0), 1.0, scale)
    codes = op.Clip(op.Round(op.Div(x, scale)), -128.0, 127.0)
    return op.Cast(codes, to=ir.DataType.INT8), op.Squeeze(scale, [0])


def in_place(
    query: Any, key: Any, held: Any, caches: tuple[Any, Any], scales: tuple[Any, Any] | None, mask: Any, scale: float
) -> Any:
    """The translation of `cached_attention`: GroupQueryAttention appends in place."""
    heads, groups, width = query.shape[1], key.shape[1], query.shape[3]
    rows = [op.Reshape(each, [0, 1, count * width]) for each, count in ((query, heads), (key, groups), (held, groups))]
    counts = _counts(query, op.Shape(mask, start=3, end=4))
    inputs = [*rows, *caches, *counts, None, None, None, _bias(mask), None, *(scales or (None, None))]
    small: dict[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    sizes = {"num_heads": heads, "kv_num_heads": groups, "scale": float(scale)}
    y, *present = contrib("GroupQueryAttention", inputs, 3, **sizes, **(small if scales else {}))
    return op.Reshape(y, [0, heads, 1, width]), *present


def open_attention_in_one(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    """The translation of `open_attention`."""
    return attention(query, key, value, mask, scale, causal=False)


def causal_attention_in_one(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    """The translation of `causal_attention`: keys after a query are skipped."""
    return attention(query, key, value, mask, scale, causal=True)


def attention(query: Any, key: Any, value: Any, mask: Any, scale: float, causal: bool) -> Any:
    """query: f32[B, Hq, S, D], key, value: f32[B, Hkv, S, D] -> f32[B, Hq, S, D], in one operator if possible."""
    heads, groups, width = query.shape[1], key.shape[1], query.shape[3]
    if not _same_size(query.shape[2], key.shape[2]) or value.shape[3] != width or width % WIDTHS:
        return plain_attention(query, key, value, mask, scale=scale)
    rows = [
        op.Reshape(op.Transpose(each, perm=[0, 2, 1, 3]), [0, 0, count * width])
        for each, count in ((query, heads), (key, groups), (value, groups))
    ]
    if mask is None and not causal and heads == groups:
        # The faster of the two, which supports no mask.
        y = contrib("MultiHeadAttention", rows, num_heads=heads, scale=float(scale))
        return op.Transpose(op.Reshape(y, [0, 0, heads, width]), perm=[0, 2, 1, 3])
    counts = _counts(query, op.Shape(query, start=2, end=3))
    inputs = [*rows, None, None, *counts, None, None, None, None if mask is None else _bias(mask)]
    sizes = {"num_heads": heads, "kv_num_heads": groups, "scale": float(scale), "causal": int(causal)}
    y = contrib("GroupQueryAttention", inputs, **sizes)
    return op.Transpose(op.Reshape(y, [0, 0, heads, width]), perm=[0, 2, 1, 3])


def rope(x: Any, cos: Any, sin: Any) -> Any:
    """The translation of `doubled_rope`: each token has its own row in the tables.

    The number of rows is taken from the tables, which all layers share, instead of x: it is then computed once.
    """
    half = x.shape[-1] // 2
    tables = [op.Reshape(op.Slice(each, [0], [half], [-1]), [-1, half]) for each in (cos, sin)]
    if len(x.shape) == 3:
        packed = op.Reshape(x, [1, -1, x.shape[1] * x.shape[2]])
        rows = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(cos, end=1), [0]), 1), [0])
        return op.Reshape(contrib("RotaryEmbedding", [packed, rows, *tables]), [-1, *x.shape[1:]])
    sizes = [op.Shape(cos, start=axis, end=axis + 1) for axis in (0, 2)]
    rows = op.Reshape(op.Range(0, op.Squeeze(op.Mul(*sizes), [0]), 1), op.Concat(*sizes, axis=0))
    return contrib("RotaryEmbedding", [x, rows, *tables])


def unbind(x: Any, dim: int = 0) -> tuple[Any, ...]:
    """x: [..., n, ...] -> n tensors without that axis, sliced before axes are permuted: less is copied."""
    moved = x.producer()
    if moved is None or moved.op_type != "Transpose":
        return tuple(op.Gather(x, index, axis=dim) for index in range(x.shape[dim]))
    order = list(moved.attributes["perm"].as_ints())
    axis = order.pop(dim % len(order))
    rest = [each - (each > axis) for each in order]
    parts = [op.Gather(moved.inputs[0], index, axis=axis) for index in range(x.shape[dim])]
    return tuple(parts) if rest == sorted(rest) else tuple(op.Transpose(part, perm=rest) for part in parts)


def _same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are known to be the same."""
    known = isinstance(left, int) or left.value is not None
    return known and left == right


def _counts(query: Any, length: Any) -> tuple[Any, Any]:
    """length: i64[1] -> i32[B], the last slot, and i32[], the number of slots, for GroupQueryAttention."""
    total = op.Cast(length, to=ir.DataType.INT32)
    last = op.Expand(op.Sub(total, op.Constant(value=ir.tensor([1], dtype=ir.DataType.INT32))), op.Shape(query, end=1))
    return last, op.Squeeze(total, [0])


def _bias(mask: Any) -> Any:
    """mask: bool, or f to be added -> f32 of the same shape, added to scores."""
    if mask.dtype == ir.DataType.BOOL:
        return op.Where(mask, 0.0, HIDDEN)
    return op.Max(op.Cast(mask, to=ir.DataType.FLOAT), HIDDEN)


TRANSLATIONS = {
    open_attention: open_attention_in_one,
    causal_attention: causal_attention_in_one,
    doubled_rope: rope,
    linear_w8: blocks_of_8_bits,
    embedding_16: rows_of_16_bits,
    channel_codes: codes_by_channel,
    cached_attention: in_place,
    operators.RMSNORM: rmsnorm,
    operators.HADAMARD: hadamard,
    operators.KRONECKER: kronecker,
    operators.SEGMENT_ATTENTION: segment_attention,
    aten.unbind.int: unbind,
}
