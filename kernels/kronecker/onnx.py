"""qpcompile::kronecker in standard ONNX operators: two MatMuls by factors stored as initializers."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.sums_onnx import wide_type

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def kronecker(x: Any, scale: Any, left: Any, right: Any) -> Any:
    """x: f[..., A*c], scale: f32[A*c], left: f32[A, A], right: f32[c, c] -> x.dtype[..., A*c].

    The rank and type of `x` and the shapes of the factors must be known.
    """
    values = op.Cast(x, to=ir.DataType.FLOAT)
    values = values if scale is None else op.Mul(values, scale)
    return op.Cast(changed(values, left, right, x.shape, wide_type(x)), to=x.dtype)


def changed(values: Any, left: Any, right: Any, shape: Any, wide: ir.DataType) -> Any:
    """values: f32[..., A*c] of the given shape -> f32[..., A*c], accumulated in `wide`."""
    leading, sides = [0] * (len(shape) - 1), [left.shape[0], right.shape[0]]
    values, left, right = (op.Cast(each, to=wide) for each in (values, left, right))
    values = op.MatMul(left, op.MatMul(op.Reshape(values, [*leading, *sides]), right))
    return op.Cast(op.Reshape(values, [*leading, shape[-1]]), to=ir.DataType.FLOAT)
