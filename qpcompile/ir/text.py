"""Printer of graphs: a stable textual form, equal for equal graphs on every version of torch.

    graph prefill of model.language_model
    %0 = input inputs_embeds : f32[B, S0, 48]
    # layers.0
    @layers.0.mlp.up_proj.weight : f32[96, 48]
    %1 = aten::linear(%0, @layers.0.mlp.up_proj.weight) : f32[B, S0, 96]
    return last_hidden_state = %1

Values are numbered in order; a weight is declared before its first use. Types and the names of symbolic sizes are those
of `ir/types.py`. A comment marks the start of another part of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from qpcompile.ir.names import LAYER
from qpcompile.ir.overloads import is_overload, overload_name, schema
from qpcompile.ir.program import Graph
from qpcompile.ir.types import ValueType, dtype_name, value_types
from qpcompile.nested import is_list

# torch represents "to the end" of a slice as the largest int64.
_TO_THE_END = 2**63 - 1
_NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"


def graph_text(graph: Graph) -> str:
    """The whole graph as text, with a final newline."""
    return "".join(f"{line}\n" for line in _lines(graph))


def heading(graph: Graph) -> str:
    """The first line of a printed graph."""
    return f"graph {graph.name}" + (f" of {graph.owner}" if graph.owner else "")


def value_labels(graph: Graph) -> dict[fx.Node, str]:
    """The label of each value: `%n` in order of definition, `@name` for a weight, so that two reads share it."""
    labels: dict[fx.Node, str] = {}
    count = 0
    for node in graph.nodes:
        if node.op == "get_attr":
            labels[node] = f"@{node.target}"
        elif node.op != "output":
            labels[node] = f"%{count}"
            count += 1
    return labels


def module_path(node: fx.Node) -> str | None:
    """The dotted name of the innermost module a node was traced in; None if unknown."""
    names = [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name != _NO_SCOPE]
    return str(names[-1]) if names else None


def target_text(target: object) -> str:
    """An operator's name: `aten::relu`, `aten::sym_size.int`, `operator.add`."""
    if is_overload(target):
        name, overload = schema(target).name, overload_name(target)
        return name if overload == "default" else f"{name}.{overload}"
    module = str(getattr(target, "__module__", "")).lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def _lines(graph: Graph) -> Iterator[str]:
    labels, types = value_labels(graph), value_types(graph)
    inputs, declared = iter(graph.inputs), set[str]()
    part: str | None = None
    yield heading(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            yield _typed(f"{labels[node]} = input {next(inputs)}", types[node])
        elif node.op == "call_function":
            now = part_of(node)
            if now is not None and now != part:
                part = now
                yield f"# {part}"
            for source in node.all_input_nodes:
                if source.op == "get_attr" and labels[source] not in declared:
                    declared.add(labels[source])
                    yield _typed(labels[source], types[source])
            yield _typed(f"{labels[node]} = {_call(node, labels)}", types[node])
    (values,) = graph.output_node.args
    assert isinstance(values, (tuple, list))
    for name, value in zip(graph.outputs, values, strict=True):
        yield f"return {name} = {_argument(value, labels)}"


def _typed(text: str, kind: ValueType) -> str:
    return f"{text} : {kind}" if kind.is_known else text


def _call(node: fx.Node, labels: dict[fx.Node, str]) -> str:
    parts = [_argument(value, labels) for value in node.args]
    parts += [f"{key}={_argument(value, labels)}" for key, value in node.kwargs.items()]
    return f"{target_text(node.target)}({', '.join(parts)})"


def _argument(value: Any, labels: dict[fx.Node, str]) -> str:
    """One argument of a call: constants by their repr, dtypes as in types."""
    if isinstance(value, fx.Node):
        return labels[value]
    if is_list(value):
        return f"[{', '.join(_argument(item, labels) for item in value)}]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, (torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    return "end" if value == _TO_THE_END else repr(value)


def part_of(node: fx.Node) -> str | None:
    """The part of the model a node was traced in: its layer, else the first component of its module path, else `top`;
    None if unknown.
    """
    path = module_path(node)
    if path is None:
        return None
    names = path.split(".")
    for length in range(len(names), 0, -1):
        if LAYER.search(prefix := ".".join(names[:length])):
            return prefix
    return names[0] or "top"
