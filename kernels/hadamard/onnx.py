"""qpcompile::hadamard in plain ONNX operators: two MatMul by the constant factors of the rotation."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.hadamard.reference import factor_arrays

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def hadamard(x: Any, scale: Any = None) -> Any:
    """x: f[..., C], scale: f32[C] -> x.dtype[..., C]. The rank, type and C of `x` must be known."""
    shape, dtype = x.shape, x.dtype
    assert shape is not None and dtype is not None
    return op.Cast(transform(op.Cast(x, to=ir.DataType.FLOAT), scale, True, shape), to=dtype)


def transform(x: Any, scale: Any, rotated: bool, shape: Any) -> Any:
    """x: f32[..., C] of the given shape -> f32[..., C], rotated and scaled as the arguments ask."""
    if rotated:
        channels = shape[-1]
        assert isinstance(channels, int)
        return _rotate(x, scale, channels, len(shape))
    return x if scale is None else op.Mul(x, scale)


def _rotate(x: Any, scale: Any, channels: int, rank: int) -> Any:
    """x: f32[..., C] -> f32[..., C]."""
    left, right = factor_arrays(channels)
    leading = [0] * (rank - 1)
    values = x if scale is None else op.Mul(x, scale)
    values = op.Reshape(values, [*leading, left.shape[0], right.shape[0]])
    values = op.MatMul(op.Constant(value=ir.tensor(left)), op.MatMul(values, op.Constant(value=ir.tensor(right))))
    return op.Reshape(values, [*leading, channels])
