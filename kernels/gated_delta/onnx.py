"""`qpcompile::gated_delta` as an ONNX Loop, one token per iteration, in float32.

A function that contains a Loop is inlined before the conversion from opset 18 and must be written in it.
"""

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import FLOAT, opset18, opset21

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
loop: Any = opset18


@onnxscript.script()
def recurrence(q, k, v, decay, beta, state, y) -> tuple[FLOAT[...], FLOAT[...]]:  # noqa: ANN001
    """q, k: f32[S, B, H, D, 1], v: f32[S, B, H, 1, E], decay, beta: f32[S, B, H, 1, 1], state: f32[B, H, D, E],
    y: f32[0, B, H, E].
    """
    key_axis = loop.Constant(value_ints=[2])
    first = loop.Constant(value_ints=[0])
    for t in range(loop.Squeeze(loop.Shape(q, start=0, end=1))):
        key = loop.Gather(k, t, axis=0)
        state = state * loop.Exp(loop.Gather(decay, t, axis=0))
        missing = loop.Gather(v, t, axis=0) - loop.ReduceSum(state * key, key_axis, keepdims=1)
        state = state + key * (loop.Gather(beta, t, axis=0) * missing)
        row = loop.ReduceSum(state * loop.Gather(q, t, axis=0), key_axis, keepdims=0)
        y = loop.Concat(y, loop.Unsqueeze(row, first), axis=0)
    return y, state


def gated_delta(q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any) -> Any:
    """q, k: f[B, S, H, D], v: f[B, S, H, E], decay, beta: f[B, S, H], state: f32[B, H, D, E] -> y of q's type
    [B, S, H, E], and the state after the last token.
    """
    q, k, v = (op.Transpose(op.Cast(each, to=ir.DataType.FLOAT), perm=[1, 0, 2, 3]) for each in (q, k, v))
    gates = (op.Transpose(op.Cast(each, to=ir.DataType.FLOAT), perm=[1, 0, 2]) for each in (decay, beta))
    decay, beta = (op.Unsqueeze(each, [3, 4]) for each in gates)
    nothing = op.Slice(v, [0], [0], [0])
    y, after = recurrence(op.Unsqueeze(q, [4]), op.Unsqueeze(k, [4]), op.Unsqueeze(v, [3]), decay, beta, state, nothing)
    return op.Transpose(y, perm=[1, 0, 2, 3]), after
