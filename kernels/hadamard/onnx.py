"""qpcompile::hadamard in standard ONNX operators: two MatMuls by the rotation's constant factors."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.hadamard.reference import factor_arrays
from qpcompile.kernels.sums_onnx import wide_type

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def hadamard(x: Any, scale: Any = None) -> Any:
    """x: f[..., C], scale: f32[C] -> x.dtype[..., C]. The rank, type and C of `x` must be known."""
    shape, dtype = x.shape, x.dtype
    assert shape is not None and dtype is not None
    values = op.Cast(x, to=ir.DataType.FLOAT)
    values = values if scale is None else op.Mul(values, scale)
    return op.Cast(rotated(values, shape, wide_type(x)), to=dtype)


def rotated(values: Any, shape: Any, wide: ir.DataType) -> Any:
    """values: f32[..., C] of the given shape -> f32[..., C], accumulated in `wide`."""
    channels, leading = shape[-1], [0] * (len(shape) - 1)
    assert isinstance(channels, int)
    arrays = [each.astype(wide.numpy()) for each in factor_arrays(channels)]
    left, right = (op.Constant(value=ir.tensor(each)) for each in arrays)
    values = op.Reshape(op.Cast(values, to=wide), [*leading, len(arrays[0]), len(arrays[1])])
    values = op.MatMul(left, op.MatMul(values, right))
    return op.Cast(op.Reshape(values, [*leading, channels]), to=ir.DataType.FLOAT)
