"""ONNX export of products per expert on stored weights: a placeholder for each operator, split into those of linears.

    y = ExpertLinearInt(q, scale, weight, weight_scale, index)
      ->  for each expert:  r = NonZero(index == expert);  y[r] = LinearInt(q[r], scale[r], weight[expert], ...)

A translation sees weights without data, and a placeholder of a linear needs an initializer of its own: experts are
split once there is data, before the placeholders of linears are lowered (linear_int/placeholder.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qpcompile.kernels.linear_int.placeholder import DOMAIN, constant, initializer, placeholder_op

NAMES = ("ExpertLinearInt", "ExpertLinearA16")
SIZES = ("slots", "rows", "in_features", "dtype", "bits")

EXPERT_LINEAR_INT = placeholder_op(NAMES[0], ("q", "scale", "weight", "weight_scale", "index"), SIZES)
EXPERT_LINEAR_A16 = placeholder_op(NAMES[1], ("x", "weight", "weight_scale", "index"), SIZES)


def split_experts(model: ir.Model) -> None:
    """Replace the placeholders of products per expert in `model`, in place, by one of a linear for each expert."""
    graph = model.graph
    for node in [node for node in graph if node.domain == DOMAIN and node.op_type in NAMES]:
        *given, _, _, index = node.inputs
        places = len(given), len(given) + 1
        stored, scales = (initializer(node, place) for place in places)
        assert index is not None
        tape = ir.tape.Tape()
        y = _routed(tape, graph, node, [each for each in given if each is not None], (stored, scales), index)
        for number, made in enumerate(tape.nodes):
            made.name = f"{node.name}/{made.op_type}_{number}"
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [y])
        for value in (stored, scales):
            if not value.uses() and not value.is_graph_output():
                graph.initializers.pop(value.name or "", None)
    if not any(node.domain == DOMAIN for node in graph):
        graph.opset_imports.pop(DOMAIN, None)


def _routed(
    tape: ir.tape.Tape,
    graph: ir.Graph,
    node: ir.Node,
    given: Sequence[ir.Value],
    weights: tuple[ir.Value, ir.Value],
    index: ir.Value,
) -> ir.Value:
    """given: [N, I, ...] each, weights: [E, O, ...] each, index: i64[N, J] -> dtype[N, J, O]."""
    slots, rows, columns, dtype, _ = (node.attributes[name].as_int() for name in SIZES)
    arrays = [_array(value) for value in weights]
    experts, outputs = arrays[0].shape[:2]
    last = constant(tape, np.array([-1], np.int64))
    column = constant(tape, np.arange(slots) // (slots // rows))
    widths = [columns, *(int(value.shape[-1]) for value in given[1:])]  # type: ignore[index,arg-type]
    flat = [
        tape.op(
            "Reshape",
            [tape.op("Gather", [value, column], {"axis": 1}), constant(tape, np.array([-1, width], np.int64))],
        )
        for value, width in zip(given, widths, strict=True)
    ]
    chosen = tape.op("Reshape", [index, last])
    width = constant(tape, np.array([outputs], np.int64))
    shape = tape.op("Concat", [tape.op("Shape", [chosen]), width], {"axis": 0})
    zero = tape.op("Cast", [constant(tape, np.array([0], np.float32))], {"to": dtype})
    y = tape.op("Expand", [zero, shape])
    for expert in range(experts):
        equal = tape.op("Equal", [chosen, constant(tape, np.int64(expert))])
        here = tape.op("Transpose", [tape.op("NonZero", [equal])], {"perm": [1, 0]})
        own = [_own(graph, value, array, expert) for value, array in zip(weights, arrays, strict=True)]
        part = [tape.op("GatherND", [value, here]) for value in flat]
        made = _int(tape, node, part, *own) if node.op_type == NAMES[0] else _a16(tape, node, part[0], *own)
        y = tape.op("ScatterND", [y, here, made])
    return tape.op("Reshape", [y, constant(tape, np.array([-1, slots, outputs], np.int64))])


def _int(tape: ir.tape.Tape, node: ir.Node, part: Sequence[ir.Value], weight: ir.Value, scale: ir.Value) -> ir.Value:
    """The placeholder of linear_int on the rows of one expert."""
    groups = [int(value.shape[-1]) for value in (node.inputs[1], scale)]  # type: ignore[union-attr,index,arg-type]
    known = {name: node.attributes[name].as_int() for name in ("in_features", "dtype", "bits")}
    known |= {"groups": max(groups), "scale_groups": groups[0], "rank": 2}
    return tape.op("LinearInt", [*part, weight, scale], known, domain=DOMAIN)


def _a16(tape: ir.tape.Tape, node: ir.Node, rows: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
    """The product of the rows of one expert: linear_w4a16's placeholder, or a float product on 8-bit codes."""
    known = {name: node.attributes[name].as_int() for name in ("in_features", "dtype")}
    if weight.dtype == ir.DataType.UINT8:
        return tape.op("LinearW4A16", [rows, weight, scale], known, domain=DOMAIN)
    groups, outputs = _array(scale).shape[1], _array(scale).shape[0]
    wide = tape.op("Cast", [rows], {"to": ir.DataType.FLOAT})
    codes = tape.op("Cast", [weight], {"to": ir.DataType.FLOAT})
    blocks = constant(tape, np.array([outputs, groups, -1], np.int64))
    steps = tape.op("Unsqueeze", [scale, constant(tape, np.array([2], np.int64))])
    dense = tape.op("Mul", [tape.op("Reshape", [codes, blocks]), steps])
    dense = tape.op("Reshape", [dense, constant(tape, np.array([outputs, -1], np.int64))])
    y = tape.op("MatMul", [wide, tape.op("Transpose", [dense], {"perm": [1, 0]})])
    return tape.op("Cast", [y], {"to": known["dtype"]})


def _own(graph: ir.Graph, value: ir.Value, array: np.ndarray, expert: int) -> ir.Value:
    """The part of an initializer that is one expert's, registered once for all readers."""
    name = f"{value.name}.{expert}"
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.ascontiguousarray(array[expert]), name=name)
    own = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
    graph.register_initializer(own)
    return own


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
