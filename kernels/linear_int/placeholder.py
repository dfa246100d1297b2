"""Two-step ONNX export of operators on stored weights, because a translation sees weights without data.

The translation emits one placeholder node of our own domain; `lower_placeholders` replaces it by standard ONNX once the
data is available, with the weight stored as INT4[K, N], two codes per byte, or as UINT8[K, N]: in the layout of a
product.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import values

from qpcompile.errors import ExportError
from qpcompile.kernels.linear_int.packing import codes_of

DOMAIN = "qpcompile"
CALL = "qpcompile.call"
"""Metadata of a node: the call and the operator that it was recorded for (emit/onnx/functions.py)."""
FIRST_OPSET = 21
"""The first ONNX opset with 4-bit integers."""

Build = Callable[[ir.tape.Tape, ir.Node, ir.Value, np.ndarray], ir.Value]
"""(tape, placeholder, stored weight, weight_scale: f32[N, Gw]) -> y; writes the new nodes to the tape."""

Store = Callable[[np.ndarray, np.ndarray], tuple[str, ir.TensorProtocol]]
"""(codes: i8[N, K], weight_scale: f32[N, Gw]) -> the suffix of the stored tensor's name, and the tensor."""


def placeholder_op(name: str, inputs: Sequence[str], attributes: Sequence[str]) -> values.Op:
    """The operator `name` of our domain, with inputs of any type, the last one optional, and integer attributes."""
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    parameters = [schema.FormalParameter(each, f"T_{each}", param_option=option.Single) for each in inputs[:-1]]
    parameters.append(schema.FormalParameter(inputs[-1], f"T_{inputs[-1]}", param_option=option.Optional))
    types = [f"tensor({each})" for each in ("float", "float16", "bfloat16", "int8", "uint8", "int64")]
    signature = schema(
        name,
        DOMAIN,
        1,
        inputs=parameters,
        outputs=[schema.FormalParameter("y", "T_y")],
        type_constraints=[(f"T_{each}", types, "") for each in (*inputs, "y")],
        attributes=[schema.Attribute(each, schema.AttrType.INT) for each in attributes],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, signature)


def lower_placeholders(
    model: ir.Model,
    name: str,
    weight_at: int,
    build: Build,
    store: Store | None = None,
    takes: Callable[[int, int], bool] | None = None,
) -> None:
    """Replace every node `name` of our domain in `model`; input `weight_at` is the stored weight, the next its scale.

    Weights become INT4[K, N] or UINT8[K, N], or the result of `store`. A node whose numbers of inputs and of groups
    `takes` rejects is skipped. A weight that several nodes share stays shared, and unused initializers are removed.
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == name]
    opset = graph.opset_imports.get("", 0)
    if nodes and opset < FIRST_OPSET:
        raise ExportError(
            f"ONNX opset {opset} has no 4-bit integers",
            where=f"{DOMAIN}::{name}",
            do=f"export with opset_version={FIRST_OPSET} or later",
        )
    for node in nodes:
        packed, scale = initializer(node, weight_at), initializer(node, weight_at + 1)
        scales, in_features = _array(scale).astype(np.float32), node.attributes["in_features"].as_int()
        if takes is not None and not takes(in_features, scales.shape[1]):
            continue
        weight = _stored(graph, packed, in_features, scales, store)
        tape = ir.tape.Tape()
        y = build(tape, node, weight, scales)
        for index, made in enumerate(tape.nodes):
            made.name = f"{node.name}/{made.op_type}_{index}"
            if CALL in node.metadata_props:
                made.metadata_props.setdefault(CALL, node.metadata_props[CALL])
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [y])
        for value in (packed, scale):
            if not value.uses() and not value.is_graph_output():
                graph.initializers.pop(value.name or "", None)
    if not any(node.domain == DOMAIN for node in graph):
        graph.opset_imports.pop(DOMAIN, None)


def constant(tape: ir.tape.Tape, array: np.ndarray | np.generic, name: str | None = None) -> ir.Value:
    """A constant node that holds `array`; name: of the value."""
    value = tape.op("Constant", [], {"value": ir.tensor(array)})
    value.name = name or value.name
    return value


def add_bias_and_cast(tape: ir.tape.Tape, y: ir.Value, bias: ir.Value | None, dtype: ir.DataType) -> ir.Value:
    """y: f32[..., N], bias: f[N] -> dtype[..., N], added in float32."""
    if bias is not None:
        y = tape.op("Add", [y, tape.op("Cast", [bias], {"to": ir.DataType.FLOAT})])
    return y if dtype == ir.DataType.FLOAT else tape.op("Cast", [y], {"to": dtype})


def initializer(node: ir.Node, index: int) -> ir.Value:
    """Input `index` of `node`, which must be an initializer with data."""
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise ExportError(
            f"input {index} of {node.op_type} has no data in the model, so it cannot be stored in 4 bits",
            where=f"node {node.name}",
            do="keep packed weights and their scales as buffers of the exported module, not as graph inputs",
        )
    return value


def _array(value: ir.Value) -> np.ndarray:
    """The data of an initializer."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _stored(graph: ir.Graph, packed: ir.Value, in_features: int, scale: np.ndarray, store: Store | None) -> ir.Value:
    """packed: u8[N, ceil(K/2)] or i8[N, K] -> the tensor that `store` returns, registered once for all readers."""
    given = _array(packed)
    store = store or (int4_columns if given.dtype == np.uint8 else uint8_columns)
    ending, tensor = store(codes_of(torch.from_numpy(np.ascontiguousarray(given)), in_features).numpy(), scale)
    tensor.name = f"{packed.name}_{ending}"
    if tensor.name in graph.initializers:
        return graph.initializers[tensor.name]
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
    graph.register_initializer(value)
    return value


def int4_columns(codes: np.ndarray, scale: np.ndarray) -> tuple[str, ir.TensorProtocol]:
    """codes: i8[N, K] -> INT4[K, N]."""
    columns = codes.T
    return "int4", ir.PackedTensor(pack_pairs(columns), ir.DataType.INT4, shape=ir.Shape(columns.shape))


def uint8_columns(codes: np.ndarray, scale: np.ndarray) -> tuple[str, ir.TensorProtocol]:
    """codes: i8[N, K] -> UINT8[K, N], codes + 128."""
    return "uint8", ir.tensor(np.ascontiguousarray(codes.T).view(np.uint8) ^ 128)


def pack_pairs(codes: np.ndarray) -> np.ndarray:
    """codes: i8 or u8[...] -> u8[ceil(elements / 2)], ONNX's order: the first of two neighbours in the low nibble."""
    flat = np.pad(codes.reshape(-1), (0, codes.size % 2)).view(np.uint8)
    return (flat[0::2] & 15) | (flat[1::2] << 4)
