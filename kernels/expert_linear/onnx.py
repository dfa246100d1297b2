"""qpcompile::expert_linear in standard ONNX operators: the slots of each expert are gathered, multiplied, scattered."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.sums_onnx import wide_type

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def expert_linear(x: Any, weight: Any, index: Any) -> Any:
    """x: f[N, I, C], weight: f[E, O, C], index: i[N, J] -> f[N, J, O]."""
    wide = wide_type(x)
    experts, outputs, channels = (int(size) for size in weight.shape)
    slots, rows = int(index.shape[1]), int(x.shape[1])
    columns = op.Constant(value=ir.tensor(np.arange(slots) // (slots // rows), dtype=ir.DataType.INT64))
    flat = op.Reshape(op.Gather(op.Cast(x, to=wide), columns, axis=1), [-1, channels])
    chosen = op.Reshape(op.Cast(index, to=ir.DataType.INT64), [-1])
    weights = op.Transpose(op.Cast(weight, to=wide), perm=[0, 2, 1])
    shape = op.Concat(op.Shape(chosen), op.Constant(value=ir.tensor([outputs], dtype=ir.DataType.INT64)), axis=0)
    y = op.Expand(op.Constant(value=ir.tensor([0.0], dtype=wide)), shape)
    for expert in range(experts):
        here = op.Transpose(op.NonZero(op.Equal(chosen, expert)), perm=[1, 0])
        own = op.MatMul(op.GatherND(flat, here), op.Gather(weights, expert, axis=0))
        y = op.ScatterND(y, here, own)
    return op.Cast(op.Reshape(y, [-1, slots, outputs]), to=x.dtype)
