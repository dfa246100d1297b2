"""Build ONNX graphs by recording operator calls: `op.Add(x, 1)` appends a node to a graph under construction.

Translations are plain functions on `ir.Value`; while one runs, a Recorder is onnxscript's evaluator. Python numbers,
lists and numpy arrays among the inputs become constants of the type that the operator's schema asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qpcompile.kernels.linear_int.placeholder import CALL

_FORMAL = onnx.defs.OpSchema.FormalParameterOption


class Recorder:
    """An onnxscript evaluator that appends nodes to `graph`; equal constants are stored once.

    Nodes are named after `scope`, the module being translated, and marked with `call`, a name and its operator.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.scope = ""
        self.call = ""
        self.functions: dict[ir.OperatorIdentifier, ir.Function] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._count = 0

    def eval_op(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One operator call: onnxscript's entry point."""
        schema: onnx.defs.OpSchema = op.op_schema
        if schema.name == "Constant":
            return self._constant_operator(kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}
        if schema.name == "Cast" and isinstance(args[0], ir.Value) and args[0].dtype == given["to"]:
            return args[0]
        attributes = {name: value for name, value in given.items() if name in schema.attributes}
        inputs, types = self._inputs(schema, args, {name: given[name] for name in given.keys() - attributes.keys()})
        outputs = [each for each in schema.outputs if each.option is not _FORMAL.Optional]
        result = self._node(schema.domain, schema.name, inputs, attributes, len(outputs))
        # Types are propagated, so that numbers become constants of the type that they are combined with.
        for parameter, value in zip(outputs, result if isinstance(result, tuple) else (result,), strict=True):
            dtype = ir.DataType(attributes["to"]) if schema.name == "Cast" else types.get(parameter.type_str)
            if dtype is not None:
                value.dtype = dtype
        return result

    def eval_function(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call of a scripted function: a node that refers to it, inlined at the end."""
        proto = function.to_function_proto()
        stored = ir.serde.deserialize_function(proto)
        # Opsets 19 to 21 only add types to the operators that scripted functions use.
        stored.opset_imports.update(self.graph.opset_imports)
        self.functions[stored.identifier()] = stored
        inputs, rest = list(args[: len(proto.input)]), list(args[len(proto.input) :])
        names = [*proto.attribute, *(attribute.name for attribute in proto.attribute_proto)]
        attributes = dict(zip(names, rest, strict=False)) | dict(kwargs)
        return self._node(proto.domain, proto.name, inputs, attributes, len(proto.output))

    def constant(self, value: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant, stored as an initializer; `dtype` None takes it from the value."""
        if isinstance(value, ir.TensorProtocol):
            tensor = value
        elif isinstance(value, (np.ndarray, np.generic)) and dtype is None:
            tensor = ir.tensor(np.asarray(value))
        else:
            tensor = ir.tensor(np.asarray(value).tolist(), dtype=dtype or _natural(value))
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(f"constant_{len(self._constants)}", tensor)
        return self._constants[key]

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A named tensor of the graph."""
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def copy(self, value: ir.Value) -> ir.Value:
        """The same tensor under another name."""
        return self._node("", "Identity", [value], {}, 1)

    def node(
        self, domain: str, name: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], outputs: int
    ) -> Any:
        """A node of a domain without an onnxscript schema: version 1, inputs unchanged."""
        self.graph.opset_imports.setdefault(domain, 1)
        return self._node(domain, name, inputs, attributes, outputs)

    def _node(self, domain: str, name: str, inputs: Sequence[Any], attributes: Mapping[str, Any], outputs: int) -> Any:
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        node = ir.node(name, inputs, dict(attributes), domain=domain, num_outputs=outputs)
        self._count += 1
        node.name = f"{self.scope}/{name}_{self._count}".lstrip("/")
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_{index}" if outputs > 1 else node.name
        if self.call:
            node.metadata_props[CALL] = self.call
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def _constant_operator(self, attributes: Mapping[str, Any]) -> ir.Value:
        ((name, value),) = ((name, value) for name, value in attributes.items() if value is not None)
        types = {"value_float": ir.DataType.FLOAT, "value_floats": ir.DataType.FLOAT, "value_int": ir.DataType.INT64}
        return self.constant(value, None if name == "value" else types.get(name, ir.DataType.INT64))

    def _inputs(
        self, schema: onnx.defs.OpSchema, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, ir.DataType]]:
        """The inputs as values, and the binding of each type variable of the schema, if known."""
        formal = list(schema.inputs)
        given: list[tuple[Any, Any]] = []
        for index, arg in enumerate(args):
            given.append((formal[min(index, len(formal) - 1)], arg))
        for parameter in formal[len(args) :]:
            given.append((parameter, kwargs.get(parameter.name)))
        bound = {
            parameter.type_str: value.dtype
            for parameter, value in given
            if isinstance(value, ir.Value) and value.dtype is not None
        }
        return [
            self._value(value, bound.get(parameter.type_str, _only(parameter))) for parameter, value in given
        ], bound

    def _value(self, value: Any, dtype: ir.DataType | None) -> ir.Value | None:
        if value is None or isinstance(value, ir.Value):
            return value
        if isinstance(value, (list, tuple)) and any(isinstance(item, ir.Value) for item in value):
            return self.vector(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return self.constant(value)
        return self.constant(value, dtype)

    def vector(self, items: Sequence[Any]) -> ir.Value:
        """i64[n] of numbers, some of them only known at run time."""
        if not any(isinstance(item, ir.Value) for item in items):
            return self.constant(list(items), ir.DataType.INT64)
        parts: list[Any] = []
        for item in items:
            if isinstance(item, ir.Value):
                parts.append(self._node("", "Reshape", [item, self.constant([1], ir.DataType.INT64)], {}, 1))
            else:
                parts.append(self.constant([item], ir.DataType.INT64))
        return parts[0] if len(parts) == 1 else self._node("", "Concat", parts, {"axis": 0}, 1)


def _only(parameter: onnx.defs.OpSchema.FormalParameter) -> ir.DataType | None:
    """The type of an input that allows only one."""
    types = [name for name in parameter.types if name.startswith("tensor(")]
    return _NAMES.get(types[0]) if len(types) == 1 else None


_NAMES = {"tensor(int64)": ir.DataType.INT64, "tensor(bool)": ir.DataType.BOOL, "tensor(float)": ir.DataType.FLOAT}


def _natural(value: Any) -> ir.DataType:
    kind = np.asarray(value).dtype.kind
    return {"b": ir.DataType.BOOL, "i": ir.DataType.INT64, "u": ir.DataType.INT64}.get(kind, ir.DataType.FLOAT)
