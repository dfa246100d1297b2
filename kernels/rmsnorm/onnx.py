"""qpcompile::rmsnorm in standard ONNX operators."""

from typing import Any

from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def rmsnorm(x: Any, weight: Any, eps: float) -> Any:
    """x: f32[..., C], weight: f32[C] -> f32[..., C]."""
    mean = op.ReduceMean(op.Mul(x, x), [-1], keepdims=1)
    return op.Mul(weight, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, eps)))))
