"""Graphs in and out of JSON text: names of operators from a fixed list of places, never code.

    {"format": 1, "name": "prefill", "owner": "model.language_model", "inputs": [...], "outputs": [...], ...,
     "nodes": [
      {"label": "%0", "op": "input", "type": "f32[B, S0, 48]"},
      {"label": "@norm.weight", "op": "weight", "key": "model.language_model.norm.weight", "type": "f32[48]"},
      {"label": "%1", "op": "call", "target": "aten::mul.Tensor", "args": [{"ref": "%0"}, {"ref": "@norm.weight"}], ...}
    ]}

Labels are those of the printed graph, so that both can be read side by side. What JSON has no word for is an object
with one key: a reference, a tuple, a dtype, a device, a layout, a memory format, a float that is not finite.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from qpcompile.errors import ArtifactError, ExportError
from qpcompile.ir import operators
from qpcompile.ir.edit import set_tensor
from qpcompile.ir.facts import QuantizedFact, StubFact, quantized_fact, set_fact, stub_fact
from qpcompile.ir.program import Graph
from qpcompile.ir.text import TYPE, module_path, target_text, value_labels, value_types
from qpcompile.ir.value_types import example_sizes

FORMAT = 1
NAMESPACES = {"aten": torch.ops.aten, "qpcompile": operators.ours}
# The one operator of another package that graphs of transformers models hold, and the module that defines it.
EXPERTS, EXPERTS_MODULE = "transformers::grouped_mm_fallback", "transformers.integrations.moe"
# Operators that reach outside the graph.
REFUSED = frozenset({"aten::from_file", "aten::save", "aten::warn", "aten::_print"})
_SIZES = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.neg),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem),
    *(math.ceil, math.floor, math.trunc),
    *(torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite),
)
SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {target_text(function): function for function in _SIZES}
KINDS = {"placeholder": "input", "get_attr": "weight", "call_function": "call"}
FACTS = {"quantized": QuantizedFact, "stub": StubFact}
Labels = dict[fx.Node, str]
_AGAIN = "save the model again with this version, or load it with the one that saved it"
_OPERATOR = re.compile(r"([a-z]\w*)::(\w+)\.(\w+)", re.ASCII)
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?", re.ASCII)
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)


def write_graph(graph: Graph, keys: Mapping[str, str]) -> str:
    """JSON text of a graph, one node per line; `keys` names the stored tensor of each `get_attr` target.

    Raises ExportError for an operator that reading would refuse.
    """
    labels, types = value_labels(graph), value_types(graph)
    head = {
        "format": FORMAT,
        "name": graph.name,
        "owner": graph.owner,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "returns": graph.returns,
        "constants": example_sizes(graph) | graph.constants,
    }
    nodes: dict[str, fx.Node] = {}
    for node in graph.nodes:
        nodes.setdefault(labels.get(node, ""), node)
    lines = [json.dumps(_node(node, labels, types, keys)) for node in nodes.values()]
    return json.dumps(head, indent=1).removesuffix("\n}") + ',\n "nodes": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def read_graph(text: str, tensors: Mapping[str, torch.Tensor], where: str) -> Graph:
    """The graph of JSON text, reading the stored `tensors`; `where` names the file in errors.

    Raises ArtifactError for an operator outside the list, a reference to nothing, or any other text.
    """
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise _refused(f"the graph has format {data['format']}, this version reads {FORMAT}", where)
        return _Reader(tensors, where).graph(data)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _refused(f"this is not a graph: {type(error).__name__}: {error}", where) from error


def _node(node: fx.Node, labels: Labels, types: Labels, keys: Mapping[str, str]) -> dict[str, Any]:
    if node.op == "output":
        return {"op": "output", "args": _encode(node.args[0], labels)}
    entry: dict[str, Any] = {"label": labels[node], "op": KINDS.get(node.op)}
    if node.op == "get_attr":
        entry["key"] = keys[str(node.target)]
    elif node.op == "call_function":
        entry |= {"target": _target(node), "args": [_encode(value, labels) for value in node.args]}
        entry |= {"kwargs": {key: _encode(value, labels) for key, value in node.kwargs.items()}} if node.kwargs else {}
        path = module_path(node)
        entry |= {} if path is None else {"module": path}
    elif node.op != "placeholder":
        raise ExportError(f"a {node.op} node cannot be saved", where=node.name, do="report this as a defect")
    fact = quantized_fact(node) or stub_fact(node)
    if fact is not None:
        kind = next(kind for kind, form in FACTS.items() if isinstance(fact, form))
        entry["fact"] = {"kind": kind, **dataclasses.asdict(fact)}
    return {**entry, "type": types[node]}


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        text = f"{target._schema.name}.{target._overloadname}"
        if _allowed(target._schema.name):
            return text
    elif (text := target_text(target)) in SIZE_FUNCTIONS:
        return text
    raise ExportError(
        f"the operator {text} cannot be saved: a saved graph holds operators of {', '.join(NAMESPACES)} only",
        where=node.name,
        do="report the model family",
    )


def _allowed(name: str) -> bool:
    return name not in REFUSED and (name.split("::")[0] in NAMESPACES or name == EXPERTS)


def _encode(value: Any, labels: Labels) -> Any:
    if isinstance(value, fx.Node):
        return {"ref": labels[value]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, labels) for item in value]}
    if isinstance(value, list):
        return [_encode(item, labels) for item in value]
    for key, kind in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ExportError(f"the argument {value!r} cannot be saved", do="report this as a defect")


class _Reader:
    """Builds one graph; `values` are the nodes made so far, by label."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self.tensors = tensors
        self.where = where
        self.root = torch.nn.Module()
        self.made = fx.Graph()
        self.values: dict[str, fx.Node] = {}

    def graph(self, data: dict[str, Any]) -> Graph:
        for entry in data["nodes"]:
            self._add(entry)
        self.made.lint()
        graph = Graph(
            name=data["name"],
            module=fx.GraphModule(self.root, self.made),
            inputs=tuple(data["inputs"]),
            outputs=tuple(data["outputs"]),
            owner=data["owner"],
            returns=data["returns"],
            constants=data["constants"],
        )
        inputs = sum(node.op == "placeholder" for node in graph.nodes)
        returned = [node.args[0] for node in graph.nodes if node.op == "output"]
        if inputs != len(graph.inputs) or [_count(values) for values in returned] != [len(graph.outputs)]:
            raise _refused("the graph's inputs or outputs do not match their names", self.where)
        return graph

    def _add(self, entry: dict[str, Any]) -> None:
        if entry["op"] == "output":
            self.made.output(self._decode(entry["args"]))
            return
        label = entry["label"]
        if label in self.values:
            raise _refused(f"the value {label} is defined twice", self.where)
        # Names become Python identifiers in the text torch makes of a graph, so they are ours, not the file's.
        if entry["op"] == "input":
            node = self.made.placeholder(f"v{len(self.values)}")
        elif entry["op"] == "weight":
            node = self._weight(label, entry["key"])
        elif entry["op"] == "call":
            args = tuple(self._decode(value) for value in entry["args"])
            kwargs = {self._keyword(key): self._decode(value) for key, value in entry.get("kwargs", {}).items()}
            target = self._operator(entry["target"])
            node = self.made.create_node("call_function", target, args, kwargs, f"v{len(self.values)}")
        else:
            raise _refused(f"there is no kind of node called {entry['op']!r}", self.where)
        node.meta[TYPE] = str(entry["type"])
        if "module" in entry:
            node.meta["nn_module_stack"] = _stack(str(entry["module"]))
        if "fact" in entry:
            set_fact(node, _fact(entry["fact"]))
        self.values[label] = node

    def _weight(self, label: str, key: str) -> fx.Node:
        name = label.removeprefix("@")
        if not label.startswith("@") or not _NAME.fullmatch(name):
            raise _refused(f"{label!r} is no name of a weight", self.where)
        if key not in self.tensors:
            raise _refused(f"the tensor {key} is not stored", self.where)
        set_tensor(self.root, name, self.tensors[key])
        node = self.made.get_attr(name)
        node.meta["val"] = self.tensors[key]
        return node

    def _keyword(self, key: str) -> str:
        if not (key.isascii() and key.isidentifier()) or keyword.iskeyword(key):
            raise _refused(f"{key!r} is no argument name", self.where)
        return key

    def _operator(self, text: str) -> Callable[..., Any]:
        if text in SIZE_FUNCTIONS:
            return SIZE_FUNCTIONS[text]
        match = _OPERATOR.fullmatch(text)
        if match is None or not _allowed(f"{match[1]}::{match[2]}"):
            raise _refused(f"the operator {text!r} is not one that a saved graph may hold", self.where)
        namespace, name, overload = match.groups()
        if namespace not in NAMESPACES:
            importlib.import_module(EXPERTS_MODULE)
        packet = getattr(NAMESPACES.get(namespace, torch.ops.transformers), name, None)
        found = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
        if not isinstance(found, torch._ops.OpOverload):
            raise _refused(f"the operator {text} does not exist here (torch {torch.__version__})", self.where)
        return found

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "ref":
            if content not in self.values:
                raise _refused(f"the value {content!r} is used before it is defined", self.where)
            return self.values[content]
        if kind == "tuple":
            return tuple(self._decode(item) for item in content)
        return self._constant(kind, content)

    def _constant(self, kind: str, content: str) -> Any:
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "device" and _DEVICE.fullmatch(content):
            return torch.device(content)
        types = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
        if kind in types and isinstance(found := getattr(torch, content, None), types[kind]):
            return found
        raise _refused(f"{ {kind: content} } is no argument", self.where)


def _stack(path: str) -> dict[str, tuple[str, str]]:
    """A module stack as tracing leaves it: every module on the way to `path`."""
    names = path.split(".")
    prefixes = ["", *(".".join(names[: length + 1]) for length in range(len(names)))] if path else [""]
    return {prefix: (prefix, "") for prefix in prefixes}


def _count(values: Any) -> int:
    return len(values) if isinstance(values, tuple) else -1


def _fact(data: dict[str, Any]) -> QuantizedFact | StubFact:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "kind"}
    return FACTS[data["kind"]](**fields)


def _refused(what: str, where: str) -> ArtifactError:
    return ArtifactError(what, where=where, do=_AGAIN)
