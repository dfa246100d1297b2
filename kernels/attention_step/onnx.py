"""`qpcompile::attention_step` in standard ONNX operators: the composition of its parts."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.attention_kv.onnx import attention_kv
from qpcompile.kernels.rope_kv_append.onnx import rope_kv_append
from qpcompile.kernels.transform_quantize.onnx import transform_quantize

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def attention_step(
    q: Any,
    k: Any,
    v: Any,
    cos: Any,
    sin: Any,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    k_codes: Any,
    k_affine: Any,
    v_codes: Any,
    v_affine: Any,
    center: Any,
    mask: Any,
    scale: float,
    *epilogue: Any,
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Operands as in reference.py -> `Stepped`."""
    past = k_codes, k_affine, v_codes, v_affine
    query, *cache = rope_kv_append(q, k, v, cos, sin, rotate, k_bits, v_bits, *past, center)
    batch, heads, tokens, size = q.shape
    query.shape, query.dtype = q.shape, q.dtype
    for part, old in zip(cache, past, strict=True):
        # The number of tokens is another one, which nothing below reads.
        part.shape, part.dtype = ir.Shape([*old.shape[:2], None, old.shape[3]]), old.dtype
    y = attention_kv(query, cache[0], cache[1], cache[2], cache[3], mask, scale, k_bits, v_bits)
    if q.dtype == ir.DataType.DOUBLE:
        y = op.Cast(op.Cast(y, to=ir.DataType.FLOAT), to=ir.DataType.DOUBLE)
    rows = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, heads * size])
    rows.shape, rows.dtype = ir.Shape([batch, tokens, heads * size]), q.dtype
    return *transform_quantize(rows, *epilogue), *cache
