"""`qpcompile::select_tokens` as two TopK: by score, with onnxruntime breaking ties by lower index, then by index."""

from typing import Any

from onnxscript import opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def select_tokens(scores: Any, keep: Any, quota: Any) -> Any:
    """scores: f32[B, S], keep: i64 or a number N, quota: i64[B] -> index: i64[B, N] ascending, valid: bool[B, N]."""
    count = op.Constant(value_ints=[keep]) if isinstance(keep, int) else op.Reshape(keep, [1])
    _, ranked = op.TopK(scores, count, axis=1, largest=1, sorted=1)
    index, rank = op.TopK(ranked, count, axis=1, largest=0, sorted=1)
    return index, op.Less(rank, op.Unsqueeze(quota, [1]))
