"""`qpcompile::rope_kv_write` in standard ONNX operators: the composition of its parts."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.hadamard.onnx import hadamard
from qpcompile.kernels.kv_write.onnx import kv_write
from qpcompile.kernels.rope.onnx import rope

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def rope_kv_write(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, rotate: bool, k_bits: int, v_bits: int, center: Any = None
) -> tuple[Any, Any, Any, Any, Any]:
    """Operands as in reference.py -> `Written`."""

    def changed(x: Any) -> Any:
        shape, dtype = x.shape, x.dtype
        # Rows in float64 hold float32 values: only the rotation sums in it (reference.py).
        if cos is not None:
            narrow = _as(op.Cast(x, to=ir.DataType.FLOAT), shape, ir.DataType.FLOAT)
            x = _as(op.Cast(rope(narrow, cos, sin), to=dtype), shape, dtype)
        return hadamard(x) if rotate else x

    key = _as(changed(k), k.shape, k.dtype)
    if center is not None:
        narrow = op.Sub(op.Cast(key, to=ir.DataType.FLOAT), op.Cast(center, to=ir.DataType.FLOAT))
        key = _as(op.Cast(narrow, to=k.dtype), k.shape, k.dtype)
    return changed(q), *kv_write(key, k_bits), *kv_write(v, v_bits)


def _as(x: Any, shape: Any, dtype: ir.DataType) -> Any:
    """x with the shape and type that operators after it read."""
    x.shape, x.dtype = shape, dtype
    return x
