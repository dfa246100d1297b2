"""Write each operator as one node: its nodes become the body of an ONNX function in the domain `qpcompile`.

    rmsnorm_quantize(x, weight, clip_ratio) -> y, y_2        one node per call; the body is stored once

Translations record standard operators in place, so that clean-ups see all nodes at once. Afterwards the nodes of each
call, which the recorder has marked, move to a function. Inlining gives the same nodes again: runtimes that inline
functions when they load a model, as onnxruntime does, compute what they computed without functions.

Calls share a function if their bodies are equal but for tensors. Small constants that are equal in all calls are in the
body, other tensors are inputs; small integers (axes, sizes) always are in the body.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from qpcompile.emit.onnx.translate.nodes import GIVEN, IR_VERSION
from qpcompile.kernels.linear_int.placeholder import CALL, DOMAIN

LEAST = 3
"""An operator of fewer nodes stays as it is."""
SMALL = 16
"""Constants of so many numbers may be in a body."""
VERSION = 1
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
Given = Mapping[ir.Value | float, str]
"""Names of what an operator was given: tensors and numbers."""
Use = tuple[ir.Node, int, ir.Value]
"""A node, the index of one of its inputs, and the value there."""


def finish(model: ir.Model, functions: bool) -> None:
    """Remove marks and common subexpressions, in place; with functions, make a node of each call before."""
    if functions:
        outline(model)
    for part in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(part):
            node.metadata_props.pop(CALL, None)
    # Merging keeps the names of outputs, not of their sizes.
    shapes = [value.shape for value in model.graph.outputs]
    bodies = [ir.Model(function.graph, ir_version=IR_VERSION) for function in model.functions.values()]
    for part in (model, *bodies):
        CommonSubexpressionEliminationPass()(part)
        RemoveUnusedNodesPass()(part)
    for value, shape in zip(model.graph.outputs, shapes, strict=True):
        value.shape = shape


def outline(model: ir.Model) -> None:
    """Replace the nodes of each marked call by one node, in place.

    Common subexpressions of several calls must not have been merged yet.
    """
    graph, given = model.graph, model.meta[GIVEN]
    _lift_constants(graph)
    marked: dict[str, list[ir.Node]] = {}
    for node in graph:
        if mark := node.metadata_props.get(CALL, ""):
            marked.setdefault(mark, []).append(node)
    alike: dict[str, _Alike] = {}
    for mark, nodes in marked.items():
        if len(nodes) >= LEAST:
            name, operator = mark.split()
            call = _Call(nodes)
            if (body := call.text(operator)) not in alike:
                told = given.get(mark, {})
                names = [_name(value, told) for value in (*call.inputs, *call.constants)]
                alike[body] = _Alike(operator, names, list(dict.fromkeys(told.values())), {})
            alike[body].calls[name] = nodes
    used = Counter[str]()
    for each in alike.values():
        used[each.operator] += 1
        number = used[each.operator]
        _replace(model, each.operator if number == 1 else f"{each.operator}_{number}", each)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name or "")
    graph.sort()


@dataclass(frozen=True)
class _Alike:
    """Calls of an operator with equal bodies, by name.

    names: of the inputs and of the constants of a body. operands: names that the operator has, in its order.
    """

    operator: str
    names: Sequence[str]
    operands: Sequence[str]
    calls: dict[str, Sequence[ir.Node]]


class _Call:
    """The nodes of one call, the values it takes and gives, and its small numbers that may be others, by use."""

    def __init__(self, nodes: Sequence[ir.Node]) -> None:
        own = set(nodes)
        self.nodes = nodes
        self.uses = [use for node in nodes for use in _uses(node)]
        self.inside = {(user, index) for user, index, _ in self.uses}
        taken = [value for _, _, value in self.uses if value.producer() not in own]
        self.inputs = list(dict.fromkeys(value for value in taken if not _is_small(value)))
        self.constants = [value for value in taken if _may_differ(value)]
        made = [value for node in nodes for value in node.outputs]
        self.outputs = [
            value for value in made if value.is_graph_output() or not self.inside.issuperset(map(tuple, value.uses()))
        ]

    def text(self, operator: str) -> str:
        """The operator and its body, equal for calls that may share a function."""
        labels = {value: f"input {index}" for index, value in enumerate(self.inputs)}
        body = _text(self.nodes, labels)
        return f"{operator}\n{body}\n{[labels[value] for value in self.outputs]}"


def _lift_constants(graph: ir.Graph) -> None:
    """Make constant nodes initializers, equal small ones the same."""
    known = {_content(value.const_value): value for value in graph.initializers.values() if _is_small(value)}
    for node in list(graph):
        old = node.outputs[0]
        tensor = ir.convenience.get_const_tensor(old) if node.op_type == "Constant" and not node.domain else None
        if tensor is None or old.is_graph_output():
            continue
        new = ir.Value(
            name=old.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        if tensor.size <= SMALL:
            new = known.setdefault(_content(tensor), new)
        if new.name not in graph.initializers:
            graph.register_initializer(new)
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)


def _is_small(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and value.const_value.size <= SMALL


def _may_differ(value: ir.Value) -> bool:
    return _is_small(value) and value.dtype in FLOATS


def _content(tensor: Any) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.tobytes()


def _inner(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _uses(node: ir.Node) -> Iterator[Use]:
    """What a node takes: by itself, and in the graphs in it from outside of them."""
    for index, value in enumerate(node.inputs):
        if value is not None:
            yield node, index, value
    for graph in _inner(node):
        local = {*graph.inputs, *graph.initializers.values()}
        for each in graph:
            yield from [use for use in _uses(each) if use[2] not in local]
            local.update(each.outputs)


def _text(nodes: Sequence[ir.Node], labels: dict[ir.Value, str]) -> str:
    """Nodes as text; labels: of the values from outside, to which those of the nodes are added."""
    lines: list[str] = []
    for node in nodes:
        told = [_attribute_text(each, labels) for _, each in sorted(node.attributes.items())]
        taken = [_label(value, labels) for value in node.inputs]
        labels.update({value: f"{len(labels) + index}" for index, value in enumerate(node.outputs)})
        made = [f"{labels[each]} {each.dtype}" for each in node.outputs]
        lines.append(f"{made} {node.op_identifier()} {told} {taken}")
    return "\n".join(lines)


def _attribute_text(attribute: ir.Attr, labels: dict[ir.Value, str]) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return f"{attribute.name} {_content(attribute.as_tensor())}"
    if attribute.type != ir.AttributeType.GRAPH:
        return f"{attribute.name} {attribute.value!r}"
    graph = attribute.as_graph()
    labels.update({value: f"{len(labels) + index}" for index, value in enumerate(graph.inputs)})
    labels.update({value: str(_content(value.const_value)) for value in graph.initializers.values()})
    return f"{attribute.name} {{\n{_text(list(graph), labels)}\n}} {[_label(each, labels) for each in graph.outputs]}"


def _label(value: ir.Value | None, labels: Mapping[ir.Value, str]) -> str:
    if value is None or value in labels:
        return "" if value is None else labels[value]
    return f"number {value.dtype}" if _may_differ(value) else str(_content(value.const_value))


def _name(value: ir.Value, given: Given) -> str:
    if value in given:
        return given[value]
    if not value.is_initializer():
        return "x"
    stored = str(value.name)
    for old, name in given.items():
        # A weight that was stored in another form is named after the one that was given.
        if isinstance(old, ir.Value) and old.name and stored.startswith(f"{old.name}_"):
            return name
    array = value.const_value.numpy() if value.const_value is not None and value.dtype in FLOATS else None
    if array is not None and array.size and (array == array.flat[0]).all():
        numbers = {np.float32(number): name for number, name in given.items() if isinstance(number, float)}
        if np.float32(array.flat[0]) in numbers:
            return numbers[np.float32(array.flat[0])]
    last = stored.rpartition("/")[2].rpartition(".")[2]
    return "constant" if last.startswith(("constant_", "val_")) or not last.isidentifier() else last


def _replace(model: ir.Model, name: str, alike: _Alike) -> None:
    """Make the function of calls with equal bodies from the first one's nodes, and call it."""
    graph, first = model.graph, _Call(next(iter(alike.calls.values())))
    slots = zip(*(_Call(nodes).constants for nodes in alike.calls.values()), strict=True)
    differing = [slot for slot, values in enumerate(slots) if any(value is not values[0] for value in values)]
    used = [*range(len(first.inputs)), *(len(first.inputs) + slot for slot in differing)]
    places = {operand: place for place, operand in enumerate(alike.operands)}
    used.sort(key=lambda index: places.get(alike.names[index], len(places)))
    formals = {index: ir.Value(name=alike.names[index]) for index in used}
    nodes: list[ir.Node] = []
    outputs: list[ir.Value] = []
    for call_name, members in alike.calls.items():
        call = _Call(members)
        taken = (*call.inputs, *call.constants)
        node = ir.node(name, [taken[index] for index in used], domain=DOMAIN, num_outputs=len(call.outputs))
        scope, within, _ = str(members[0].name).partition("/")
        node.name = f"{scope}/{call_name}" if within else call_name
        graph.insert_before(members[0], node)
        for old, new in zip(call.outputs, node.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            for user, index in tuple(old.uses()):
                if (user, index) not in call.inside:
                    user.replace_input_with(index, new)
            for index, value in enumerate(graph.outputs):
                if value is old:
                    graph.outputs[index] = new
        graph.remove(members)
        if not nodes:
            nodes, outputs = [*_enter(call, formals), *members], call.outputs
        else:
            for user, index, _ in call.uses:
                user.replace_input_with(index, None)
    graph.opset_imports.setdefault(DOMAIN, VERSION)
    model.functions[(DOMAIN, name, "")] = _function(name, list(formals.values()), outputs, nodes, graph.opset_imports)


def _enter(call: _Call, formals: Mapping[int, ir.Value]) -> list[ir.Node]:
    """Let the nodes of a call take the inputs of a function, and constants, which are returned.

    formals: by index among the call's inputs and constants.
    """
    inputs = {value: formals[index] for index, value in enumerate(call.inputs)}
    constants: dict[ir.Value, ir.Node] = {}
    slot = len(call.inputs)
    for user, index, value in call.uses:
        if _may_differ(value) and slot in formals:
            user.replace_input_with(index, formals[slot])
        elif _is_small(value):
            if value not in constants:
                constants[value] = ir.node("Constant", [], {"value": value.const_value})
            user.replace_input_with(index, constants[value].outputs[0])
        elif value in inputs:
            user.replace_input_with(index, inputs[value])
        slot += _may_differ(value)
    return list(constants.values())


def _function(
    name: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    opsets: Mapping[str, int],
) -> ir.Function:
    """Nodes of no graph as a function: with short names, and without the sizes, which are those of one call."""
    taken = {str(value.name) for node in nodes for graph in _inner(node) for value in _without_sizes(graph)}
    for value in inputs:
        value.name = _free(str(value.name), taken)
    for value in outputs:
        value.name = _free("y", taken)
    for node in nodes:
        node.name = _free(node.op_type, taken)
        for value in node.outputs:
            value.name = value.name if value in outputs else _free(node.op_type, taken)
            value.type = value.shape = None
    body = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opsets[""]})
    for each in ir.traversal.RecursiveGraphIterator(body):
        body.opset_imports.setdefault(each.domain, opsets[each.domain])
    return ir.Function(DOMAIN, name, graph=body, attributes=[])


def _without_sizes(graph: ir.Graph) -> Iterator[ir.Value]:
    """The values of a graph in a body, whose sizes are removed; runtimes ask that counters of loops are scalars."""
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        value.shape = value.shape if value.shape is not None and not len(value.shape) else None
        yield value
    for node in graph:
        for inner in _inner(node):
            yield from _without_sizes(inner)


def _free(name: str, taken: set[str]) -> str:
    """A name that is not taken yet, which it then is."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found
