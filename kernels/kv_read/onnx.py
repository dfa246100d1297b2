"""`qpcompile::kv_read` in standard ONNX operators; bit-identical to the reference."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def kv_read(codes: Any, affine: Any, head_dim: int, bits: int, dtype: int) -> Any:
    """codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2] -> dtype[B, H, S, D], D = head_dim."""
    double = ir.DataType.DOUBLE
    wide = double if dtype == double else ir.DataType.FLOAT
    return op.Cast(dequantize(codes, affine, head_dim, bits, wide), to=dtype)


def dequantize(codes: Any, affine: Any, head_dim: int, bits: int, wide: ir.DataType) -> Any:
    """The same in f32 or, where it is exact, in f64, for translations that continue with the result."""
    values = op.Cast(unpack_planes(codes, head_dim) if bits == 4 else codes, to=wide)
    affine = op.Cast(affine, to=wide)
    scale = op.Slice(affine, [0], [1], [-1])
    zero = op.Slice(affine, [1], [2], [-1])
    return op.Mul(op.Sub(values, zero), scale)


def unpack_planes(codes: Any, head_dim: int) -> Any:
    """codes: u8[..., ceil(D / 2)] -> u8[..., D], each in 0..15."""
    low = op.BitwiseAnd(codes, _byte(15))
    # OpenVINO shifts by a division that it rounds: of multiples of 16 there is nothing to round.
    high = op.BitShift(op.BitwiseAnd(codes, _byte(240)), _byte(4), direction="RIGHT")
    both = op.Concat(low, high, axis=-1)
    return op.Slice(both, [0], [head_dim], [-1]) if head_dim % 2 else both


def _byte(value: int) -> Any:
    return op.Constant(value=ir.tensor([value], dtype=ir.DataType.UINT8))
