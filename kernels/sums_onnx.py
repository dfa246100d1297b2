"""The accumulation type of ONNX translations, as sums.py has it."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def wide_type(x: Any) -> ir.DataType:
    """DOUBLE for a float64 value, FLOAT for float32 and half precision."""
    return ir.DataType.DOUBLE if x.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def constant(number: float, wide: ir.DataType) -> Any:
    """wide[]: a constant of the accumulation type."""
    return op.Constant(value=ir.tensor(number, dtype=wide))
