"""`qpcompile::attention_kv` in standard ONNX operators, grouped-query without repeating keys or values."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.attention_kv.masking import FORBIDDEN
from qpcompile.kernels.kv_read.onnx import dequantize
from qpcompile.kernels.sums_onnx import constant, wide_type

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def attention_kv(
    q: Any,
    k_codes: Any,
    k_affine: Any,
    v_codes: Any,
    v_affine: Any,
    mask: Any,
    scale: float,
    k_bits: int,
    v_bits: int,
) -> Any:
    """q: f[B, Hq, Sq, D], codes: u8[B, Hkv, S, ceil(D bits / 8)], affine: f32[B, Hkv, S, 2] -> as q."""
    heads, groups, head_dim, wide = q.shape[1], k_codes.shape[1], q.shape[3], wide_type(q)
    k = op.Transpose(dequantize(k_codes, k_affine, head_dim, k_bits, wide), perm=[0, 1, 3, 2])
    v = dequantize(v_codes, v_affine, head_dim, v_bits, wide)
    queries = scaled_queries(q, scale, wide)
    products = op.MatMul(group_rows(queries, groups, head_dim), k)
    probabilities = masked_softmax(split_rows(products, heads), mask, wide)
    y = split_rows(op.MatMul(op.Reshape(probabilities, [0, groups, -1, 0]), v), heads)
    return op.Cast(y, to=q.dtype)


def scaled_queries(q: Any, scale: float, wide: ir.DataType) -> Any:
    """q: f[B, H, R, D] -> wide[B, H, R, D], times the scale."""
    # A vector: onnxruntime would fold a scalar into the following product as a float32 attribute.
    factor = op.Constant(value=ir.tensor([scale] * q.shape[3], dtype=wide))
    return op.Mul(op.Cast(q, to=wide), factor)


def group_rows(queries: Any, groups: int, head_dim: int) -> Any:
    """queries: f[B, Hq, R, D] -> f[B, Hkv, Hq / Hkv * R, D]: the query heads of one KV head become its rows."""
    return op.Reshape(queries, [0, groups, -1, head_dim])


def split_rows(products: Any, heads: int) -> Any:
    """products: f[B, Hkv, Hq / Hkv * R, N] -> f[B, Hq, R, N]: the reverse of group_rows."""
    return op.Reshape(products, [0, heads, -1, 0])


def masked_scores(scores: Any, mask: Any, wide: ir.DataType) -> Any:
    """scores: wide[..., Sq, S], mask as in masking.py -> wide[..., Sq, S], masked keys are -inf."""
    nothing = constant(float("-inf"), wide)
    if mask.dtype == ir.DataType.BOOL:
        return op.Where(mask, scores, nothing)
    bias = op.Cast(mask, to=wide)
    return op.Where(op.Greater(bias, constant(FORBIDDEN, wide)), op.Add(scores, bias), nothing)


def masked_softmax(scores: Any, mask: Any, wide: ir.DataType) -> Any:
    """scores: wide[..., Sq, S] -> probabilities wide[..., Sq, S]; a fully masked row is 0."""
    if mask is None:
        return op.Softmax(scores, axis=-1)
    scores = masked_scores(scores, mask, wide)
    blind = op.Equal(op.ReduceMax(scores, [-1], keepdims=1), constant(float("-inf"), wide))
    return op.Where(blind, constant(0.0, wide), op.Softmax(scores, axis=-1))
