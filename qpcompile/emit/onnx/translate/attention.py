"""`aten::scaled_dot_product_attention` in standard ONNX operators.

The stock translation gives NaN for a query whose keys are all masked, such as a padding token on the left, and the NaN
propagates through the keys of the next layer. Here such a row is 0, as in torch.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.errors import ExportError
from qpcompile.kernels.attention_kv.onnx import group_rows, masked_softmax, scaled_queries, split_rows

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """query: f[B, Hq, Sq, D], key: f[B, Hkv, S, D], value: f[B, Hkv, S, Dv] -> f[B, Hq, Sq, Dv], f32 or f64 inside."""
    heads, groups, width = query.shape[1], key.shape[1], query.shape[3]
    grouped = heads != groups
    needed = (heads, groups, width) if grouped else (width,)
    if dropout_p or not all(isinstance(size, int) for size in needed):
        raise ExportError(
            f"attention with {heads} and {groups} heads, width {width} and dropout {dropout_p} has no translation",
            where="aten::scaled_dot_product_attention",
            do="report this family",
        )
    double = ir.DataType.DOUBLE
    wide = double if query.dtype == double else ir.DataType.FLOAT
    scaled = scaled_queries(query, width**-0.5 if scale is None else scale, wide)
    key, value = (op.Cast(each, to=wide) for each in (key, value))
    products = op.MatMul(group_rows(scaled, groups, width) if grouped else scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    scores = split_rows(products, heads) if grouped else products
    weights = masked_softmax(scores, _causal(query, key) if is_causal else attn_mask, wide)
    if grouped:
        weights = op.Reshape(weights, [0, groups, -1, 0])
    y = op.MatMul(weights, value)
    return op.Cast(split_rows(y, heads) if grouped else y, to=query.dtype)


def _causal(query: Any, key: Any) -> Any:
    """bool[Sq, S]: query i sees keys 0 to i, as torch defines it."""
    rows = op.Range(0, op.Squeeze(op.Shape(query, start=2, end=3)), 1)
    columns = op.Range(0, op.Squeeze(op.Shape(key, start=2, end=3)), 1)
    mask = op.GreaterOrEqual(op.Unsqueeze(rows, [1]), op.Unsqueeze(columns, [0]))
    mask.dtype = ir.DataType.BOOL
    return mask
