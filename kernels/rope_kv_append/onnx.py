"""`qpcompile::rope_kv_append` in standard ONNX operators: the composition of its parts."""

from typing import Any

from onnxscript import opset21

from qpcompile.kernels.rope_kv_append.reference import PARTS
from qpcompile.kernels.rope_kv_write.onnx import rope_kv_write

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def rope_kv_append(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, rotate: bool, k_bits: int, v_bits: int, *past: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """Operands as in reference.py -> `Written` with P + S tokens."""
    *parts, center = past if len(past) > len(PARTS) else (*past, None)
    y, *new = rope_kv_write(q, k, v, cos, sin, rotate, k_bits, v_bits, center)
    first, second, third, fourth = (op.Concat(*pair, axis=2) for pair in zip(parts, new, strict=True))
    return y, first, second, third, fourth
