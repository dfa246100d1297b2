"""The attention of token scores in ONNX: a Loop over blocks of query rows, from the first requested row.

A graph exported at opset 21 is built at opset 18 and converted; a function that contains a Loop is inlined before the
conversion and must therefore be written in opset 18.
"""

from collections.abc import Set
from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import FLOAT, opset18, opset21

from qpcompile.kernels.attention_kv.masking import FORBIDDEN
from qpcompile.kernels.token_scores.settings import Attention, Tokens

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
loop: Any = opset18
ROWS = 128


@onnxscript.script()
def attention_mass(queries, keys, bias, chosen, first, rows, grouped) -> FLOAT[...]:  # noqa: ANN001
    """queries: f32[B, H, S, D], keys: f32[B, Hkv, D, S], bias: f32[B | 1, 1 | H, S, S], chosen: f32[B, M, S], same out.

    first, rows: i64[1], where to begin and the size of a piece. grouped: i64[4], the shape that joins the query heads
    of one key head.
    """
    axis = loop.Constant(value_ints=[2])
    nothing = loop.Constant(value_float=float("-inf"))
    left = loop.Shape(queries, start=2, end=3) - first
    pieces = loop.Squeeze((left + rows - 1) / rows)
    mass = chosen * 0.0
    for i in range(pieces):
        start = first + i * rows
        piece = loop.Slice(queries, start, start + rows, axis)
        products = loop.MatMul(loop.Reshape(piece, grouped), keys)
        shape = loop.Concat(loop.Shape(piece, start=0, end=3), loop.Constant(value_ints=[-1]), axis=0)
        scores = loop.Reshape(products, shape) + loop.Slice(bias, start, start + rows, axis)
        blind = loop.ReduceMax(scores, loop.Constant(value_ints=[-1]), keepdims=1) == nothing
        probabilities = loop.Where(blind, loop.Constant(value_float=0.0), loop.Softmax(scores, axis=-1))
        mean = loop.ReduceMean(probabilities, loop.Constant(value_ints=[1]), keepdims=0)
        mass = mass + loop.MatMul(loop.Slice(chosen, start, start + rows, axis), mean)
    return mass


def attention_terms(
    attention: Attention[Any], tokens: Tokens[Any], asked: Set[str], intra_mean: bool
) -> dict[str, Any]:
    """The requested ones of inter and intra, each f32[B, S]; other arguments as in reference.py."""
    if not asked:
        return {}
    q, k, valid = attention.q, attention.k, tokens.valid
    counted = op.And(tokens.visual, valid)
    rows = {
        "inter": op.And(tokens.queries, valid) if "inter" in asked else None,
        "intra": counted if "intra" in asked else None,
    }
    groups = {name: op.Cast(op.Unsqueeze(rows[name], [1]), to=ir.DataType.FLOAT) for name in sorted(asked)}
    chosen = op.Concat(*groups.values(), axis=1)
    bias = _bias(attention.mask, valid)
    scaled = op.Mul(op.Cast(q, to=ir.DataType.FLOAT), attention.scale)
    keys = op.Transpose(op.Cast(k, to=ir.DataType.FLOAT), perm=[0, 1, 3, 2])
    first = op.Reshape(op.ArgMax(op.ReduceMax(chosen, [0, 1], keepdims=0), axis=0), [1])
    grouped = op.Constant(value_ints=[0, k.shape[1], -1, q.shape[3]])
    mass = attention_mass(scaled, keys, bias, chosen, first, op.Constant(value_ints=[ROWS]), grouped)
    terms = {name: op.Squeeze(op.Slice(mass, [i], [i + 1], [1]), [1]) for i, name in enumerate(groups)}
    if intra_mean and "intra" in terms:
        sees = op.Cast(op.Greater(bias, float("-inf")), to=ir.DataType.FLOAT)
        seen_by = op.MatMul(groups["intra"], op.ReduceMean(sees, [1], keepdims=0))
        terms["intra"] = op.Div(terms["intra"], op.Max(op.Squeeze(seen_by, [1]), 1.0))
    return terms


def _bias(mask: Any, valid: Any) -> Any:
    """mask: bool or f[B | 1, 1 | H, S, S] or None for causal -> f32 of that shape, -inf where a key is masked."""
    never = float("-inf")
    if mask is None:
        positions = op.Range(0, op.Squeeze(op.Shape(valid, start=1, end=2)), 1)
        causal = op.LessOrEqual(positions, op.Unsqueeze(positions, [1]))
        allowed = op.And(causal, op.Unsqueeze(valid, [1, 2]))
        return op.Where(allowed, op.Constant(value_float=0.0), never)
    if mask.dtype == ir.DataType.BOOL:
        return op.Where(mask, op.Constant(value_float=0.0), never)
    bias = op.Cast(mask, to=ir.DataType.FLOAT)
    return op.Where(op.Greater(bias, FORBIDDEN), bias, never)
