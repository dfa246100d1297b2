"""qpcompile::activation in standard ONNX operators."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.activation_quantize.onnx import gated

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def activation(x: Any, up: Any, function: str) -> Any:
    """x, up: f[..., C] -> as x."""
    y = gated(x, up, function)
    return y if x.dtype == ir.DataType.FLOAT else op.Cast(y, to=x.dtype)
