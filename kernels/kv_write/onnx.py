"""`qpcompile::kv_write` in standard ONNX operators; codes are bit-identical to the reference."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def kv_write(x: Any, bits: int) -> Any:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2]."""
    highest = 2.0**bits - 1
    values = op.Cast(x, to=ir.DataType.FLOAT)
    low = op.Min(op.ReduceMin(values, [-1], keepdims=1), 0.0)
    span = op.Sub(op.Max(op.ReduceMax(values, [-1], keepdims=1), 0.0), low)
    scale = op.Div(span, highest)
    scale = op.Where(op.Equal(scale, 0.0), 1.0, scale)
    zero = op.Round(op.Div(op.Neg(low), scale))
    codes = op.Clip(op.Add(op.Round(op.Div(values, scale)), zero), 0.0, highest)
    stored = pack_planes(codes, x.shape[-1]) if bits == 4 else op.Cast(codes, to=ir.DataType.UINT8)
    return stored, op.Concat(scale, zero, axis=-1)


def pack_planes(codes: Any, head_dim: int) -> Any:
    """codes: f32[..., D], integers in 0..15 -> u8[..., ceil(D / 2)].

    low + 16 * high in floating point is exact and needs no bitwise operators, which few back ends have for u8.
    """
    plane = (head_dim + 1) // 2
    if head_dim % 2:
        codes = op.Pad(codes, [0, 1], 0.0, [-1])
    low = op.Slice(codes, [0], [plane], [-1])
    high = op.Slice(codes, [plane], [2 * plane], [-1])
    return op.Cast(op.Add(low, op.Mul(high, 16.0)), to=ir.DataType.UINT8)
