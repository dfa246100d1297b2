"""`qpcompile::channel_delta` as the ONNX Loop of gated_delta, whose decay then has a number per key channel."""

from typing import Any

import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.gated_delta.onnx import recurrence

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export


def channel_delta(q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any) -> Any:
    """q, k, decay: f[B, S, H, D], v: f[B, S, H, E], beta: f[B, S, H], state: f32[B, H, D, E] -> y of q's type
    [B, S, H, E], and the state after the last token.
    """
    q, k, v, decay = (op.Transpose(op.Cast(each, to=ir.DataType.FLOAT), perm=[1, 0, 2, 3]) for each in (q, k, v, decay))
    beta = op.Unsqueeze(op.Transpose(op.Cast(beta, to=ir.DataType.FLOAT), perm=[1, 0, 2]), [3, 4])
    nothing = op.Slice(v, [0], [0], [0])
    query, key, gate = (op.Unsqueeze(each, [4]) for each in (q, k, decay))
    y, after = recurrence(query, key, op.Unsqueeze(v, [3]), gate, beta, state, nothing)
    return op.Transpose(y, perm=[1, 0, 2, 3]), after
