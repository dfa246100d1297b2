"""qpcompile::expert_linear_a16 in ONNX: per expert the rows that chose it, a product of linears, and a scatter."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.expert_linear.placeholder import EXPERT_LINEAR_A16

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
_placeholder: Any = EXPERT_LINEAR_A16


def expert_linear_a16(x: Any, weight: Any, weight_scale: Any, index: Any) -> Any:
    """One placeholder, which `split_experts` replaces. The type, I, J and K must be known."""
    chosen = op.Cast(index, to=ir.DataType.INT64)
    sizes = {"slots": int(index.shape[1]), "rows": int(x.shape[1]), "in_features": int(x.shape[2])}
    return _placeholder(x, weight, weight_scale, chosen, **sizes, dtype=int(x.dtype), bits=16)
