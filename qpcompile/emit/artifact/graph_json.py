"""Serialize graphs to JSON and back: allowlisted operators (allowed_operators.py), names of one grammar, no code.

    {"format": 2, "name": "prefill", "owner": "model.language_model", "inputs": [...], "outputs": [...], ...,
     "nodes": [
      {"label": "%0", "op": "input", "type": "f32[B, S0, 48]"},
      {"label": "@norm.weight", "op": "weight", "key": "model.language_model.norm.weight", "type": "f32[48]"},
      {"label": "%1", "op": "call", "target": "aten::mul.Tensor", "args": [{"ref": "%0"}, {"ref": "@norm.weight"}], ...}
    ]}

Labels are those of the printed graph, so that both can be compared. Values without a JSON equivalent are objects with
one key: a reference, a tuple, a dtype, a device, a layout, a memory format, a non-finite float.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from qpcompile.emit.artifact import json_text, names
from qpcompile.emit.artifact.allowed_operators import OPERATORS
from qpcompile.emit.artifact.safe_calls import bad_call
from qpcompile.errors import ArtifactError, ExportError, QPCompileError
from qpcompile.ir import operators
from qpcompile.ir.edit import set_tensor
from qpcompile.ir.names import names as as_names
from qpcompile.ir.node_facts import QuantizedFact, StubFact, quantized_fact, set_fact, stub_fact
from qpcompile.ir.program import Graph
from qpcompile.ir.size_functions import SIZE_FUNCTIONS
from qpcompile.ir.text import module_path, target_text, value_labels
from qpcompile.ir.type_check import example_sizes
from qpcompile.ir.types import TYPE, ValueType, parse_type, type_of, value_types
from qpcompile.runtime.fixed_values import MOST_CHARACTERS, SAID, VALUES
from qpcompile.runtime.prepare import ABSENT, CAUSAL, MASK_AXES, TABLE, TABLES

FORMAT = 2
NAMESPACES = {"aten": torch.ops.aten, "qpcompile": operators.ours}
# The module that defines the only third-party operator in graphs of transformers models.
EXPERTS_MODULE = "transformers.integrations.moe"
MOST_NODES = 100_000
FUNCTIONS: dict[str, Callable[..., Any]] = {target_text(function): function for function in SIZE_FUNCTIONS}
# Required and optional keys of each kind of node.
REQUIRED = {
    "input": {"label", "op", "type"},
    "weight": {"label", "op", "type", "key"},
    "call": {"label", "op", "type", "target", "args"},
}
KEYS = {kind: needed | {"fact"} for kind, needed in REQUIRED.items()}
KEYS["call"] |= {"kwargs", "module"}
KINDS = {"placeholder": "input", "get_attr": "weight", "call_function": "call"}
FACTS = {"quantized": QuantizedFact, "stub": StubFact}
Labels = dict[fx.Node, str]
_AGAIN = "save the model again with this version, or load it with the one that saved it"
_COMPILE = "another version of qpcompile wrote it: compile the model again with this one, or load it with that version"
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?", re.ASCII)


def write_graph(graph: Graph, keys: Mapping[str, str]) -> str:
    """Serialize a graph to JSON, one node per line; `keys` names the stored tensor of each `get_attr` target.

    Raises ExportError for an operator or a call that reading would refuse.
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
    """Deserialize a graph from JSON, referring to the stored `tensors`; `where` names the file in errors.

    Raises ArtifactError for an operator outside the allowlist, a dangling reference, or any other invalid text.
    """
    try:
        return _Reader(tensors, where).graph(json_text.parse(text))
    except QPCompileError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise _refused(f"this is not a graph: {type(error).__name__}: {str(error)[:300]}", where) from error


def _node(node: fx.Node, labels: Labels, types: Mapping[fx.Node, ValueType], keys: Mapping[str, str]) -> dict[str, Any]:
    if node.op == "output":
        return {"op": "output", "args": _encode(node.args[0], labels)}
    entry: dict[str, Any] = {"label": labels[node], "op": KINDS.get(node.op)}
    if node.op == "get_attr":
        entry["key"] = keys[str(node.target)]
    elif node.op == "call_function":
        entry |= {"target": _target(node), "args": [_encode(value, labels) for value in node.args]}
        if problem := bad_call(node.target, node.args, dict(node.kwargs)):  # type: ignore[arg-type]
            raise ExportError(f"a call cannot be saved: {problem}", where=node.name, do="report the model family")
        entry |= {"kwargs": {key: _encode(value, labels) for key, value in node.kwargs.items()}} if node.kwargs else {}
        path = module_path(node)
        entry |= {} if path is None else {"module": path}
    elif node.op != "placeholder":
        raise ExportError(f"a {node.op} node cannot be saved", where=node.name, do="report this as a defect")
    fact = quantized_fact(node) or stub_fact(node)
    if fact is not None:
        kind = next(kind for kind, form in FACTS.items() if isinstance(fact, form))
        entry["fact"] = {"kind": kind, **dataclasses.asdict(fact)}
    text = str(types[node])
    try:
        parse_type(text)
    except ValueError as error:
        raise ExportError(str(error), where=node.name, do="report the model family") from error
    return {**entry, "type": text}


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        text = f"{target._schema.name}.{target._overloadname}"
        if text in OPERATORS:
            return text
    elif (text := target_text(target)) in FUNCTIONS:
        return text
    raise ExportError(
        f"the operator {text} cannot be saved: it is not on the list of operators that a saved graph may hold",
        where=node.name,
        do="report the model family",
    )


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
    """Builds one graph; `values` are the nodes created so far, by label."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self.tensors = tensors
        self.where = where
        self.root = torch.nn.Module()
        self.made = fx.Graph()
        self.values: dict[str, fx.Node] = {}

    def graph(self, data: Any) -> Graph:
        self._check_head(data)
        *nodes, last = data["nodes"]
        for entry in nodes:
            self._add(entry)
        self._output(last, len(data["outputs"]))
        self.made.lint()
        graph = Graph(
            name=data["name"],
            module=fx.GraphModule(self.root, self.made),
            inputs=as_names(data["inputs"]),
            outputs=as_names(data["outputs"]),
            owner=data["owner"],
            returns=data["returns"],
            constants=data["constants"],
        )
        if sum(node.op == "placeholder" for node in graph.nodes) != len(graph.inputs):
            raise _refused("the graph's inputs or outputs do not match their names", self.where)
        return graph

    def _check_head(self, data: Any) -> None:
        """Check the header keys."""
        head = ("format", "name", "owner", "inputs", "outputs", "returns", "constants", "nodes")
        if not isinstance(data, dict) or sorted(data) != sorted(head):
            raise _refused(f"this is not a graph: it has not the keys {', '.join(head)}", self.where)
        if data["format"] != FORMAT:
            raise _refused(f"the graph has format {data['format']!r:.80}, this version reads {FORMAT}", self.where)
        inputs, outputs, nodes = data["inputs"], data["outputs"], data["nodes"]
        checks = {
            "name": names.is_path(data["name"]),
            "owner": data["owner"] == "" or names.is_path(data["owner"]),
            "inputs": names.are_paths(inputs),
            "outputs": names.are_paths(outputs),
            "returns": names.are_paths(outputs) and _is_template(data["returns"], frozenset(outputs)),
            "constants": _are_constants(data["constants"]),
            "nodes": isinstance(nodes, list) and all(isinstance(entry, dict) for entry in nodes),
        }
        for key, fine in checks.items():
            if not fine:
                raise _refused(f"the graph's {key} are not what a compile writes: {data[key]!r:.80}", self.where)
        if not 0 < len(nodes) <= MOST_NODES:
            raise _refused(f"the graph has {len(nodes)} nodes; 1 to {MOST_NODES} are read", self.where)

    def _output(self, entry: dict[str, Any], count: int) -> None:
        """The last node: a tuple of values, one per name."""
        values = self._decode(entry["args"]) if entry.get("op") == "output" and entry.keys() == {"op", "args"} else None
        if (
            not isinstance(values, tuple)
            or len(values) != count
            or not all(isinstance(each, fx.Node) for each in values)
        ):
            raise _refused("the graph's inputs or outputs do not match their names", self.where)
        self.made.output(values)

    def _add(self, entry: dict[str, Any]) -> None:
        kind, label = entry["op"], entry.get("label", "")
        if kind not in KEYS or not REQUIRED[kind] <= entry.keys() <= KEYS[kind]:
            raise _refused(f"this is not a graph: there is no node {entry!r:.80}", self.where)
        if not names.is_weight(label) if kind == "weight" else not names.is_value(label):
            raise _refused(
                f"{label!r:.80} is not the name of a {'weight' if kind == 'weight' else 'value'}", self.where
            )
        if label in self.values:
            raise _refused(f"the value {label} is defined twice", self.where)
        node = {"input": self._input, "weight": self._weight, "call": self._call}[kind](entry)
        node.meta[TYPE] = self._type(entry["type"], node)
        if "module" in entry:
            node.meta["nn_module_stack"] = self._stack(entry["module"])
        if "fact" in entry:
            set_fact(node, _fact(entry["fact"]))
        self.values[label] = node

    def _type(self, text: Any, node: fx.Node) -> ValueType:
        if not isinstance(text, str):
            raise _refused(f"{text!r:.80} is not a type", self.where)
        recorded, stored = parse_type(text), type_of(node.meta.get("val"))
        if recorded.is_known and stored.is_known and recorded != stored:
            raise _refused(f"the weight {node.target} is {stored}, the graph says {text}", self.where)
        return recorded

    # Names become Python identifiers in torch's generated code, so we generate them instead of using the file's.
    def _input(self, entry: dict[str, Any]) -> fx.Node:
        return self.made.placeholder(f"v{len(self.values)}")

    def _call(self, entry: dict[str, Any]) -> fx.Node:
        args = tuple(self._decode(value) for value in self._list(entry["args"]))
        kwargs = {key: self._decode(value) for key, value in entry.get("kwargs", {}).items()}
        target = self._operator(entry["target"])
        problem = bad_call(target, args, kwargs)
        if problem:
            raise _refused(f"{entry['target']} is called wrongly: {problem}", self.where)
        return self.made.create_node("call_function", target, args, kwargs, f"v{len(self.values)}")

    def _list(self, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _refused(f"this is not a graph: {value!r:.80} is not a list", self.where)
        return value

    def _weight(self, entry: dict[str, Any]) -> fx.Node:
        name, key = entry["label"].removeprefix("@"), entry["key"]
        if not isinstance(key, str) or key not in self.tensors:
            raise _refused(f"the tensor {key!r:.80} is not stored", self.where)
        set_tensor(self.root, name, self.tensors[key])
        node = self.made.get_attr(name)
        node.meta["val"] = self.tensors[key]
        return node

    def _stack(self, path: Any) -> dict[str, tuple[str, str]]:
        """A module stack like that of tracing: every module on the path to `path`."""
        if path != "" and not names.is_path(path):
            raise _refused(f"{path!r:.80} is not the name of a module", self.where)
        parts = path.split(".")
        prefixes = ["", *(".".join(parts[: length + 1]) for length in range(len(parts)))] if path else [""]
        return {prefix: (prefix, "") for prefix in prefixes}

    def _operator(self, text: Any) -> Callable[..., Any]:
        if not isinstance(text, str) or text not in OPERATORS | FUNCTIONS.keys():
            what = f"the operator {text!r:.80} is not one that a saved graph may hold"
            raise ArtifactError(what, where=self.where, do=_COMPILE if str(text).startswith("qpcompile::") else _AGAIN)
        if text in FUNCTIONS:
            return FUNCTIONS[text]
        namespace, _, rest = text.partition("::")
        if namespace not in NAMESPACES:
            importlib.import_module(EXPERTS_MODULE)
        name, _, overload = rest.partition(".")
        packet = getattr(NAMESPACES.get(namespace, torch.ops.transformers), name, None)
        found = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
        if not isinstance(found, torch._ops.OpOverload):
            raise _refused(f"the operator {text} does not exist here (torch {torch.__version__})", self.where)
        return found

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise _refused(f"the number {value!r:.80} has more than 64 bits", self.where)
            return value
        ((kind, content),) = value.items()
        if kind == "ref":
            if not isinstance(content, str) or content not in self.values:
                raise _refused(f"the value {content!r:.80} is used before it is defined", self.where)
            return self.values[content]
        if kind == "tuple":
            return tuple(self._decode(item) for item in self._list(content))
        return self._constant(kind, content)

    def _constant(self, kind: str, content: Any) -> Any:
        types = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
        if isinstance(content, str) and content.isidentifier() and kind in types:
            if isinstance(found := getattr(torch, content, None), types[kind]):
                return found
        elif kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        elif kind == "device" and isinstance(content, str) and _DEVICE.fullmatch(content):
            return torch.device(content)
        raise _refused(f"{ {kind: content}!r:.80} is not an argument", self.where)


def _is_template(shape: Any, outputs: frozenset[str]) -> bool:
    """Whether `shape` is a valid `structure.template` of a result with these outputs."""
    if isinstance(shape, dict):
        return all(names.is_path(key) and _is_template(item, outputs) for key, item in shape.items())
    if isinstance(shape, list):
        return all(_is_template(item, outputs) for item in shape)
    return shape is None or (isinstance(shape, str) and shape in outputs)


def _are_constants(constants: Any) -> bool:
    """Whether `constants` are valid traced arguments of a component, and facts about its masks."""
    if not isinstance(constants, dict) or not all(names.is_path(key) for key in constants):
        return False
    own = {TABLE: (None, *TABLES), MASK_AXES: (2, 4), CAUSAL: (True, False)}
    if any(key in constants and constants[key] not in allowed for key, allowed in own.items()):
        return False
    if not all(isinstance(constants.get(key, ""), str) for key in (VALUES, SAID)):
        return False
    if len(constants.get(SAID, "")) > MOST_CHARACTERS:
        return False
    rows = [value for key, value in constants.items() if key.startswith(f"{ABSENT}.")]
    if not all(type(count) is int and count in (0, 1) for count in rows):
        return False
    return all(value is None or isinstance(value, (bool, int, float, str, list)) for value in constants.values())


def _fact(data: dict[str, Any]) -> QuantizedFact | StubFact:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "kind"}
    fact = FACTS[data["kind"]](**fields)
    texts = [*fact.sites, fact.kernel] if isinstance(fact, QuantizedFact) else [fact.site, fact.role]
    if not all(isinstance(text, str) and len(text) <= names.MOST_CHARACTERS for text in texts):
        raise ValueError(f"{data!r:.80} is not a fact about a node")
    return fact


def _refused(what: str, where: str) -> ArtifactError:
    return ArtifactError(what, where=where, do=_AGAIN)
