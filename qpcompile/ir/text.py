"""Printer of graphs: a stable textual form, equal for equal graphs on every version of torch.

    graph prefill of model.language_model
    %0 = input inputs_embeds : f32[B, S0, 48]
    # layers.0
    @layers.0.mlp.up_proj.weight : f32[96, 48]
    %1 = aten::linear(%0, @layers.0.mlp.up_proj.weight) : f32[B, S0, 96]
    return last_hidden_state = %1

Values are numbered in order; a weight is declared before its first use. `B` is the symbolic size that most often comes
first in a shape, the others are `S0`, `S1`, ... in order of appearance. A comment marks the start of another part of
the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from qpcompile.ir.program import Graph

# The key under which a graph read from a file keeps the printed type of each value: it has no fake values.
TYPE = "type_text"
DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
# torch represents "to the end" of a slice as the largest int64.
_TO_THE_END = 2**63 - 1
_LAYER = re.compile(r"^(?:.*\.)?(?:layers|blocks|h)\.\d+$")
_NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"


def graph_text(graph: Graph) -> str:
    """The whole graph as text, with a final newline."""
    return "".join(f"{line}\n" for line in _lines(graph))


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


def value_types(graph: Graph) -> dict[fx.Node, str]:
    """The printed type of each value: `f32[B, S0, 48]`, `int S0`, `(i8[B, 48], f32[B, 1])`; "" if unknown."""
    names = _symbol_names(graph)
    return {
        node: node.meta[TYPE] if TYPE in node.meta else _type(node.meta.get("val"), names)
        for node in graph.nodes
        if node.op != "output"
    }


def symbol_examples(graph: Graph) -> dict[str, int]:
    """The example value (hint) of each printed symbol, from the sample the graph was traced with, if it has one."""
    sizes = {
        size.node.expr: size.node
        for node in graph.nodes
        for tensor in _tensors(node.meta.get("val"))
        for size in tensor.shape
        if isinstance(size, torch.SymInt)
    }
    known: dict[Any, int] = {}
    for node in sizes.values():
        known |= node.shape_env.backed_var_to_val
    return {str(name): int(known[symbol]) for symbol, name in _symbol_names(graph).items() if symbol in known}


def printed_type(value: Any) -> str:
    """The printed type of a value with concrete sizes."""
    return _type(value, {})


def module_path(node: fx.Node) -> str | None:
    """The dotted name of the innermost module a node was traced in; None if unknown."""
    names = [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name != _NO_SCOPE]
    return str(names[-1]) if names else None


def target_text(target: object) -> str:
    """An operator's name: `aten::relu`, `aten::sym_size.int`, `operator.add`."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        return name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    module = str(getattr(target, "__module__", "")).lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def _lines(graph: Graph) -> Iterator[str]:
    labels, types = value_labels(graph), value_types(graph)
    inputs, declared = iter(graph.inputs), set[str]()
    part: str | None = None
    yield f"graph {graph.name}" + (f" of {graph.owner}" if graph.owner else "")
    for node in graph.nodes:
        if node.op == "placeholder":
            yield _typed(f"{labels[node]} = input {next(inputs)}", types[node])
        elif node.op == "call_function":
            now = _part(node)
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


def _typed(text: str, kind: str) -> str:
    return f"{text} : {kind}" if kind else text


def _call(node: fx.Node, labels: dict[fx.Node, str]) -> str:
    parts = [_argument(value, labels) for value in node.args]
    parts += [f"{key}={_argument(value, labels)}" for key, value in node.kwargs.items()]
    return f"{target_text(node.target)}({', '.join(parts)})"


def _argument(value: Any, labels: dict[fx.Node, str]) -> str:
    """One argument of a call: constants by their repr, dtypes as in types."""
    if isinstance(value, fx.Node):
        return labels[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, labels) for item in value)}]"
    if isinstance(value, torch.dtype):
        return _dtype(value)
    if isinstance(value, (torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    return "end" if value == _TO_THE_END else repr(value)


def _part(node: fx.Node) -> str | None:
    """The part of the model a node belongs to: its layer, else the first component of its module path, else `top`."""
    path = module_path(node)
    if path is None:
        return None
    names = path.split(".")
    for length in range(len(names), 0, -1):
        if _LAYER.match(prefix := ".".join(names[:length])):
            return prefix
    return names[0] or "top"


def _dtype(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _type(value: Any, names: dict[Any, Any]) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(_size(size, names) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type(item, names) for item in value)})"
    for kind, symbolic in ((bool, torch.SymBool), (int, torch.SymInt), (float, torch.SymFloat)):
        if isinstance(value, (kind, symbolic)):
            return f"{kind.__name__} {_size(value, names)}"
    return ""


def _size(size: Any, names: dict[Any, Any]) -> str:
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(size)
    return str(size.node.expr.xreplace(names)).replace(" ", "")


def _symbol_names(graph: Graph) -> dict[Any, Any]:
    """A short name for every symbol in the shapes of a graph."""
    leads: Counter[Any] = Counter()
    order: dict[Any, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = [tuple(tensor.shape) for tensor in _tensors(value)]
        leads.update(size[0].node.expr for size in sizes if size and isinstance(size[0], torch.SymInt))
        order |= dict.fromkeys(symbol for size in (*sizes, (value,)) for item in size for symbol in _symbols(item))
    first = next((expression for expression, _ in leads.most_common() if expression in order), None)
    ranked = [symbol for symbol in order if symbol != first]
    # The new symbols keep the assumptions of the old ones (integer, positive): expressions keep their form.
    names = {symbol: sympy.Symbol(f"S{rank}", **symbol.assumptions0) for rank, symbol in enumerate(ranked)}
    return names | ({} if first is None else {first: sympy.Symbol("B", **first.assumptions0)})


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _symbols(size: Any) -> list[Any]:
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return []
    key: Callable[[Any], str] = str
    return sorted(size.node.expr.free_symbols, key=key)
