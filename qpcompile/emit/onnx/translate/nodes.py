"""Translate an FX graph to an ONNX graph, node by node.

No second trace: the graph runs twice, on examples of different sizes, and sizes that differ between the two runs are
dynamic. Equal sizes are constants that translations may use; everything else is a value in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator, opset21
from torch import fx

from qpcompile.emit.onnx.record import Recorder
from qpcompile.emit.onnx.translate.types import COMPLEX, HALF, TensorInfo, onnx_type
from qpcompile.emit.onnx.wrap import Part
from qpcompile.emit.onnx.writes import without_writes
from qpcompile.errors import ExportError, QPCompileError
from qpcompile.ir.edit import aten, get_tensor
from qpcompile.ir.text import module_path

op: Any = opset21  # its annotations describe onnxscript's language, not the values that pass through an export
OPSET, IR_VERSION = 21, 10
GIVEN = "given"
"""Key in `meta` of a model: by mark of a call (record.py), the names of what it was given (functions.py)."""
Feeds = Mapping[str, torch.Tensor]
Tables = tuple[Mapping[Any, Any], Mapping[Any, Any]]


def to_onnx(name: str, part: Part, examples: tuple[Feeds, Feeds], tables: Tables) -> ir.Model:
    """Translate a part to an ONNX model with the same input and output names.

    Args:
        examples: two sets of inputs in which every dynamic size has two values.
        tables: translations of torch's operators (they take a TensorInfo first) and of this project's.
    Raises ExportError for an operator without a translation.
    """
    without_writes(part.module.graph)
    part.module.recompile()
    first, second = (_run(name, part, example) for example in examples)
    facts = {node: _merge(value, second[node]) for node, value in first.items()}
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
    translator = _Translator(part, graph, facts, tables)
    with evaluator.default_as(translator.recorder):
        translator.translate()
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="qpcompile")
    model.functions.update(translator.recorder.functions)
    model.meta[GIVEN] = translator.given
    return model


def results(part: Part, example: Feeds) -> dict[str, torch.Tensor]:
    """The results of a part, by name."""
    with torch.no_grad():
        return dict(zip(part.outputs, part.module(*[example[path] for path in part.inputs]), strict=True))


class _Shapes(fx.Interpreter):
    """Runs a graph and records type and sizes of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.facts: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.facts[n] = _fact(value)
        return value


def _run(name: str, part: Part, example: Feeds) -> dict[fx.Node, Any]:
    interpreter = _Shapes(part.module)
    try:
        with torch.no_grad():
            interpreter.run(*[example[path] for path in part.inputs])
    except Exception as error:
        if isinstance(error, QPCompileError):
            raise
        raise ExportError(
            f"the {name} graph does not run on inputs of another size: {str(error).strip().splitlines()[0]}",
            where=name,
            do="report this family: its graph takes a branch for the size it was traced with",
        ) from error
    return interpreter.facts


def _fact(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorInfo(value.dtype, tuple((size, size) for size in value.shape))
    return tuple(_fact(item) for item in value) if isinstance(value, (tuple, list)) else None


def _merge(first: Any, second: Any) -> Any:
    if isinstance(first, TensorInfo):
        sizes = zip(first.sizes, second.sizes, strict=True)
        return TensorInfo(first.dtype, tuple((left[0], right[0]) for left, right in sizes))
    return tuple(map(_merge, first, second)) if isinstance(first, tuple) else None


class _Translator:
    def __init__(self, part: Part, graph: ir.Graph, facts: Mapping[fx.Node, Any], tables: Tables) -> None:
        self.part = part
        self.graph = graph
        self.facts = facts
        self.torch_table, self.own_table = tables
        self.recorder = Recorder(graph)
        self.values: dict[fx.Node, Any] = {}
        self.tensors: dict[str, ir.Value] = {}
        self.names: dict[tuple[int, int], str] = {}
        self.given: dict[str, dict[ir.Value | float, str]] = {}

    def translate(self) -> None:
        """Translate all nodes."""
        nodes = list(self.part.module.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        for path, node in zip(self.part.inputs, placeholders, strict=True):
            self.values[node] = self._input(path, self.facts[node])
        (returned,) = nodes[-1].args
        for path, node in zip(self.part.outputs, returned, strict=True):
            self._name_sizes(path, self.facts[node])
        live = _live(nodes)
        for node in nodes:
            if node in live and node.op == "call_function":
                self.recorder.scope = module_path(node) or ""
                self.recorder.call = f"{node.name} {_operator(node.target)}"
                self.values[node] = self._call(node)
        for path, node in zip(self.part.outputs, returned, strict=True):
            self._output(path, self._value(node), self.facts[node])

    def _input(self, path: str, fact: TensorInfo) -> ir.Value:
        self._name_sizes(path, fact)
        value = ir.Value(name=path, type=ir.TensorType(onnx_type[fact.dtype]), shape=self._shape(fact))
        self.graph.inputs.append(value)
        return value

    def _output(self, path: str, value: ir.Value, fact: TensorInfo) -> None:
        if value.producer() is None or value in self.graph.outputs:
            with evaluator.default_as(self.recorder):
                self.recorder.call = ""
                value = self.recorder.copy(value)
        value.name, value.shape, value.dtype = path, self._shape(fact), onnx_type[fact.dtype]
        self.graph.outputs.append(value)

    def _call(self, node: fx.Node) -> Any:
        fact = self.facts[node]
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        self.given[self.recorder.call] = dict(_named(node.target, args, kwargs))
        try:
            if not isinstance(node.target, torch._ops.OpOverload) and not any(map(_holds_value, args)):
                # Arithmetic on constant sizes.
                number: Any = node.target
                result = number(*args, **kwargs)
            elif node.target in self.own_table:
                args, kwargs = _plain(args), _plain(kwargs)
                result = self.own_table[node.target](*args, **kwargs)
            elif node.target is aten.linear.default and (weight := self._transposed(node.args[1])) is not None:
                result = _product(args, kwargs, weight)
            elif node.target in self.torch_table:
                result = self.torch_table[node.target](fact, *args, **_data(kwargs))
            else:
                raise ExportError(f"{node.target} has no translation to ONNX", do="report this family")
        except QPCompileError as error:
            error.where = f"{self.graph.name}, {node.name}" + (f", {error.where}" if error.where else "")
            raise
        if node.target is not operator.getitem:
            self._describe(node.name, result, fact)
        return result

    def _describe(self, name: str, result: Any, fact: Any) -> None:
        """Set a new value's type, sizes and name, as in the FX graph."""
        if isinstance(result, tuple):
            for index, (value, each) in enumerate(zip(result, fact or [None] * len(result), strict=False)):
                self._describe(f"{name}.{index}", value, each)
        elif isinstance(result, ir.Value) and result.shape is None:
            result.name = name
            result.dtype = onnx_type[fact.dtype] if fact else ir.DataType.INT64
            result.shape = self._shape(fact) if fact else ir.Shape(())

    def _shape(self, fact: TensorInfo) -> ir.Shape:
        """Sizes as an ONNX shape. A dynamic size has the name of the input or output axis with the same size.

        onnxruntime would otherwise derive sizes as sums and products of each other, longer with every layer.
        """
        parts = [2] if fact.dtype == COMPLEX else []
        return ir.Shape([*(a if a == b else self.names.get((a, b)) for a, b in fact.sizes), *parts])

    def _name_sizes(self, path: str, fact: TensorInfo) -> None:
        for (first, second), name in zip(fact.sizes, axis_names(path, len(fact.sizes)), strict=True):
            if first != second:
                self.names.setdefault((first, second), name)

    def _value(self, node: Any) -> Any:
        if node.op != "get_attr":
            return self.values[node]
        name = str(node.target)
        if name not in self.tensors:
            self.tensors[name] = self.recorder.initializer(name, _tensor(get_tensor(self.part.module, name), name))
        return self.tensors[name]

    def _transposed(self, weight: Any) -> ir.Value | None:
        """The transpose of a constant weight, stored transposed: f[C, N] of f[N, C]."""
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        name = f"{weight.target}.transposed"
        if name not in self.tensors:
            tensor = _tensor(get_tensor(self.part.module, str(weight.target)).T, name)
            self.tensors[name] = self.recorder.initializer(name, tensor)
        return self.tensors[name]


def _operator(target: Any) -> str:
    """The operator's name without its namespace."""
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else target.__name__
    return name.rpartition(":")[2]


def _named(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[ir.Value | float, str]]:
    """The tensors and numbers that a call is given, with the names that its operator has for them."""
    overload = isinstance(target, torch._ops.OpOverload)
    names = [each.name for each in target._schema.arguments] if overload else list(signature(target).parameters)
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if isinstance(value, (ir.Value, float)):
            yield value, name


def _product(args: Sequence[Any], kwargs: Mapping[str, Any], weight: ir.Value) -> Any:
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    product = op.MatMul(args[0], weight)
    return product if bias is None else op.Add(product, bias)


def _tensor(tensor: torch.Tensor, name: str) -> ir.TensorProtocol:
    """A tensor that is serialized lazily; half precision is written as float32."""
    detached = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    wide = torch.float32 if tensor.dtype in HALF else detached.dtype
    return ir.LazyTensor(
        lambda: ir.Tensor(detached.to(wide).contiguous().cpu().numpy()),
        dtype=onnx_type[tensor.dtype],
        shape=ir.Shape(detached.shape),
        name=name,
    )


def _live(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    live = {nodes[-1]}
    for node in reversed(nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return live


def _holds_value(arg: Any) -> bool:
    return any(map(_holds_value, arg)) if isinstance(arg, (tuple, list)) else isinstance(arg, ir.Value)


def _plain(value: Any) -> Any:
    """Arguments for translations of our own operators: types become ONNX's."""
    if isinstance(value, torch.dtype):
        return int(onnx_type[value])
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _data(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without device, layout and memory options."""
    storage = ("dtype", "device", "layout", "pin_memory", "memory_format", "non_blocking", "copy", "implicit")
    return {key: value for key, value in kwargs.items() if key not in storage}


# Names of dynamic sizes, axis by axis from the last one named; constant sizes need none.
AXES = {
    "input_ids": ("batch", "tokens"),
    "image_features": ("visual_tokens", ""),
    "visual_scores": ("visual_tokens",),
    "visual_keys": ("visual_tokens", ""),
    "attention_mask": ("batch", "tokens_so_far"),
    "position_ids": ("batch", "tokens"),
    "visual_mask": ("batch", "tokens"),
    "valid_mask": ("batch", "tokens"),
    "visual_count": ("fewest_visual_tokens",),
    "tokens_seen": ("tokens_seen",),
    "logits": ("batch", ""),
    "past_key_values": ("batch", "", "cached_{}", ""),
    "present": ("batch", "", "present_{}", ""),
    "kept": ("batch", "kept_{}"),
    "alive": ("batch", "kept_{}"),
    "pixel_values": ("pictures", "", "", ""),
}


def axis_names(path: str, rank: int) -> list[str]:
    """A name for each axis of an input or output, used if it is dynamic."""
    first, *rest = path.split(".")
    if rest and rest[0] in ("kept", "alive"):
        first, *rest = rest
    names = [name.format(*rest) for name in AXES.get(first, ())][-rank:]
    names = [""] * (rank - len(names)) + names
    return [name or f"{path}.{axis}" for axis, name in enumerate(names)]
