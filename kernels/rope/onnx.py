"""`qpcompile::rope` in standard ONNX operators."""

from typing import Any

from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def rope(x: Any, cos: Any, sin: Any) -> Any:
    """x: f32[..., D], cos, sin: f32[..., D] -> f32[..., D]."""
    half = x.shape[-1] // 2
    first, second = op.Slice(x, [0], [half], [-1]), op.Slice(x, [half], [2 * half], [-1])
    turned = op.Concat(op.Neg(second), first, axis=-1)
    return op.Add(op.Mul(x, cos), op.Mul(turned, sin))
