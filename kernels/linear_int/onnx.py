"""qpcompile::linear_int in ONNX: an initializer of 4 bits, folded to int8 when the model is loaded, and MatMulInteger.

    y = MatMulInteger(uint8(q + z), Cast(weight, int8), z) * scale * weight_scale + bias       z = 8 or 128, by the bits
    y = MatMulInteger(uint8(q + z), uint8(weight + 128), z, 128) * ...                         8-bit weights

The shift of q to unsigned is for speed only: onnxruntime computes s8 by s8 in a scalar loop. 8-bit weights are unsigned
too, because its product of u8 by s8 saturates on processors without VNNI: 2 * 255 * 127 does not fit 16 bits.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset21

from qpcompile.kernels.linear_int.placeholder import (
    CALL,
    add_bias_and_cast,
    constant,
    lower_placeholders,
    placeholder_op,
)

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
NAME = "LinearInt"
SHIFTS = {4: 8, 8: 128}
"""What is added to codes of so many bits to make them unsigned."""

_linear_int: Any = placeholder_op(
    NAME,
    ("q", "scale", "weight", "weight_scale", "bias"),
    ("in_features", "groups", "scale_groups", "rank", "dtype", "bits"),
)


def linear_int(
    q: Any, scale: Any, weight: Any, weight_scale: Any, bias: Any, dtype: int, bits: int, residual: Any = None
) -> Any:
    """The exporter's translation: one placeholder, which `lower` replaces. K, the groups and the rank must be known."""
    known = {
        "in_features": q.shape[-1],
        "groups": max(scale.shape[-1], weight_scale.shape[-1]),
        "scale_groups": scale.shape[-1],
        "rank": len(q.shape),
        "dtype": int(dtype),
        "bits": bits,
    }
    inputs = (q, scale, weight, weight_scale) if bias is None else (q, scale, weight, weight_scale, bias)
    y = _linear_int(*inputs, **known)
    return y if residual is None else op.Add(y, residual)


def lower(model: ir.Model) -> None:
    """Replace the placeholders of linear_int in `model`, in place, once its initializers have data."""
    shifted: dict[ir.Value, ir.Value] = {}

    def build(tape: ir.tape.Tape, node: ir.Node, weight: ir.Value, weight_scale: np.ndarray) -> ir.Value:
        q, scale = node.inputs[0], node.inputs[1]
        assert q is not None and scale is not None
        # Query, key and value projections read the same codes: shift them once.
        if q not in shifted:
            shifted[q] = _unsigned(tape, q, _shift(node))
        product = _by_channel if node.attributes["groups"].as_int() == 1 else _by_group
        y = product(tape, node, shifted[q], weight, weight_scale)
        bias = node.inputs[4] if len(node.inputs) > 4 else None
        return add_bias_and_cast(tape, y, bias, ir.DataType(node.attributes["dtype"].as_int()))

    lower_placeholders(model, NAME, 2, build)


def _shift(node: ir.Node) -> int:
    return SHIFTS[node.attributes["bits"].as_int()]


def _unsigned(tape: ir.tape.Tape, q: ir.Value, shift: int) -> ir.Value:
    """q: i8[..., K] -> u8[..., K], q + shift, from the rounded floats that q was cast from if there are any."""
    cast = q.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    values = source if _is_rounded(source) else tape.op("Cast", [q], {"to": ir.DataType.FLOAT})
    assert values is not None
    moved = tape.op("Add", [values, constant(tape, np.float32(shift))])
    made = tape.op("Cast", [moved], {"to": ir.DataType.UINT8})
    if cast is not None and CALL in cast.metadata_props:
        # All products read it: a result of the quantizer.
        for node in tape.nodes:
            node.metadata_props[CALL] = cast.metadata_props[CALL]
    return made


def _is_rounded(value: ir.Value | None) -> bool:
    """Whether `value` is Clip(Round(...)), so that shifting before the cast to an integer equals shifting after it."""
    clip = None if value is None else value.producer()
    if clip is None or clip.op_type != "Clip" or clip.inputs[0] is None:
        return False
    rounding = clip.inputs[0].producer()
    return rounding is not None and rounding.op_type == "Round"


def _product(tape: ir.tape.Tape, node: ir.Node, left: ir.Value, right: ir.Value, wide: bool) -> ir.Value:
    """left: u8[..., K], right: i8[..., K, N], or u8 (wide) -> the exact sums as f32[..., N]."""
    zeros = [constant(tape, np.uint8(_shift(node)))] + [constant(tape, np.uint8(SHIFTS[8]))] * wide
    exact = tape.op("MatMulInteger", [left, right, *zeros])
    return tape.op("Cast", [exact], {"to": ir.DataType.FLOAT})


def _operand(tape: ir.tape.Tape, weight: ir.Value) -> tuple[ir.Value, bool]:
    """A stored weight as an operand of MatMulInteger, and whether it is unsigned."""
    wide = weight.dtype == ir.DataType.UINT8
    return weight if wide else tape.op("Cast", [weight], {"to": ir.DataType.INT8}), wide


def _by_channel(
    tape: ir.tape.Tape, node: ir.Node, left: ir.Value, right: ir.Value, weight_scale: np.ndarray
) -> ir.Value:
    """One scale per token and per output channel -> f32[..., N]."""
    y = tape.op("Mul", [_product(tape, node, left, *_operand(tape, right)), node.inputs[1]])
    return tape.op("Mul", [y, constant(tape, weight_scale.reshape(-1), f"{node.name}/weight_scale")])


def _by_group(tape: ir.tape.Tape, node: ir.Node, left: ir.Value, right: ir.Value, weight_scale: np.ndarray) -> ir.Value:
    """Scales per group: the groups become the batch axis of one product, and its results are summed -> f32[..., N]."""
    groups, in_features = node.attributes["groups"].as_int(), node.attributes["in_features"].as_int()
    rank, out_features = node.attributes["rank"].as_int(), weight_scale.shape[0]
    size = in_features // groups

    def group_first(value: ir.Value, count: int, width: int) -> ir.Value:
        """value: [..., count * width] -> [count, T, width]."""
        rows = tape.op("Reshape", [value, constant(tape, np.array([-1, count, width], np.int64))])
        return tape.op("Transpose", [rows], {"perm": [1, 0, 2]})

    right, wide = _operand(tape, right)
    right = tape.op("Reshape", [right, constant(tape, np.array([groups, size, out_features], np.int64))])
    scale, scale_groups = node.inputs[1], node.attributes["scale_groups"].as_int()
    assert scale is not None
    y = _product(tape, node, group_first(left, groups, size), right, wide)
    y = tape.op("Mul", [y, group_first(scale, scale_groups, 1)])
    by_group = np.ascontiguousarray(weight_scale.T)[:, None, :]
    y = tape.op("Mul", [y, constant(tape, by_group, f"{node.name}/weight_scale")])
    y = tape.op("ReduceSum", [y, constant(tape, np.array([0], np.int64))], {"keepdims": 0})
    leading = tape.op("Shape", [left], {"end": rank - 1})
    shape = tape.op("Concat", [leading, constant(tape, np.array([out_features], np.int64))], {"axis": 0})
    return tape.op("Reshape", [y, shape])
