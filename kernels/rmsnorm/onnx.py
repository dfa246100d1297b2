"""ONNX expansion of `qpcompile::rmsnorm`: opset 21 has no such operator, so it is spelled out."""

import onnxscript
from onnxscript import opset21 as op


@onnxscript.script()
def rmsnorm(x, weight, eps: float):  # pyright: ignore  # onnxscript reads the body, it is not Python
    squares = op.ReduceMean(x * x, axes=op.Constant(value_ints=[-1]))
    root = op.Sqrt(squares + eps)
    return weight * (x / root)
