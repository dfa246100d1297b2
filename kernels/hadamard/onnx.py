"""qpcompile::hadamard in standard ONNX operators: two MatMuls by the rotation's constant factors, in float64."""

from typing import Any

import numpy as np
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
    """x: f32[..., C] of the given shape -> f32[..., C], scaled and rotated if asked."""
    if rotated:
        channels = shape[-1]
        assert isinstance(channels, int)
        return _rotate(x, scale, channels, len(shape))
    return x if scale is None else op.Mul(x, scale)


def _rotate(x: Any, scale: Any, channels: int, rank: int) -> Any:
    """x: f32[..., C] -> f32[..., C]."""
    arrays = [each.astype(np.float64) for each in factor_arrays(channels)]
    left, right = (op.Constant(value=ir.tensor(each)) for each in arrays)
    leading = [0] * (rank - 1)
    values = x if scale is None else op.Mul(x, scale)
    values = op.Reshape(op.Cast(values, to=ir.DataType.DOUBLE), [*leading, len(arrays[0]), len(arrays[1])])
    values = op.MatMul(left, op.MatMul(values, right))
    return op.Cast(op.Reshape(values, [*leading, channels]), to=ir.DataType.FLOAT)
