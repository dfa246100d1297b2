"""qpcompile::expert_linear_int in ONNX: per expert the rows that chose it, linear_int's product, and a scatter."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.expert_linear.placeholder import EXPERT_LINEAR_INT

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
_placeholder: Any = EXPERT_LINEAR_INT


def expert_linear_int(q: Any, scale: Any, weight: Any, weight_scale: Any, index: Any, dtype: int, bits: int) -> Any:
    """One placeholder, which `split_experts` replaces. I, J, K and the groups must be known."""
    chosen = op.Cast(index, to=ir.DataType.INT64)
    sizes = {"slots": int(index.shape[1]), "rows": int(q.shape[1]), "in_features": int(q.shape[2])}
    return _placeholder(q, scale, weight, weight_scale, chosen, **sizes, dtype=int(dtype), bits=bits)
