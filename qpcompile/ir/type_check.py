"""Type checking of graphs: infer all types from inputs and tensors, and compare them with the recorded ones.

    recorded  %7 = qpcompile::linear_int(%5, %6, @w, @w_scale, None, f32) : f32[B, S0, 96]
    derived   f32[2, 40, 96]                                                at the example sizes B = 2, S0 = 40

An artifact's graph is text and its tensors are a file: neither is trusted. Every operator runs once on fake tensors,
where torch checks its own operators and kernels/<op>/rule.py ours, and every recorded type, which later code relies on,
must equal the inferred one. Calls with operands of the same types are cached, so that a model costs as much as one of
its layers.

Sizes are those of the sample the graph was traced with: `Graph.constants` keeps them under `size.<symbol>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from qpcompile.errors import ArtifactError, KernelError
from qpcompile.ir.code_bits import other_bits
from qpcompile.ir.edit import get_tensor, map_nodes
from qpcompile.ir.names import Name
from qpcompile.ir.operators import RULES
from qpcompile.ir.program import DECODE, PREFILL, Graph
from qpcompile.ir.sizes import Size
from qpcompile.ir.text import module_path, target_text, value_labels
from qpcompile.ir.types import UNKNOWN, ValueType, symbol_examples, type_of, value_types
from qpcompile.nested import is_dict, is_list

SIZE = "size."
_AGAIN = "save the model again; do not use this folder"
_CPU = torch.device("cpu")
# Elements of one result at the example sizes: in all, from small operands, and as a multiple of the largest operand.
# Beyond them a graph asks for memory or time that has nothing to do with its weights or its inputs.
MOST_ELEMENTS, MOST_MADE, MOST_GROWTH = 2**33, 2**26, 1024
_MOST_NUMBER = 2**63


def example_sizes(graph: Graph) -> dict[str, int]:
    """The entries of `Graph.constants` that `check_values` needs once the graph is saved."""
    return {f"{SIZE}{name}": value for name, value in symbol_examples(graph).items()}


def check_values(graph: Graph) -> None:
    """Raise ArtifactError, naming graph, value and operand, unless every call and every recorded type is valid."""
    _Deriver(graph).run()


def check_graphs(graphs: Mapping[str, Graph]) -> None:
    """`check_values` and `other_bits` on every graph, and check that decode takes and returns a cache like prefill's.

    Raises ArtifactError naming graph, value and operand.
    """
    for graph in graphs.values():
        check_values(graph)
        if (problem := next(other_bits(graph), None)) is not None:
            raise ArtifactError(problem, where=f"graph/{graph.name}.json", do=_AGAIN)
    if missing := [name for name in (PREFILL, DECODE) if name not in graphs]:
        raise ArtifactError(f"there is no {missing[0]} graph", where="manifest.json, graphs", do=_AGAIN)
    prefill, decode = graphs[PREFILL], graphs[DECODE]
    left, kept = _types(prefill, prefill.outputs), _types(decode, decode.outputs)
    for path, taken in _types(decode, decode.inputs).items():
        for name, other in (("prefill", left.get(path, UNKNOWN)), ("decode", kept.get(path, UNKNOWN))):
            if _fixed(other) != _fixed(taken):
                raise ArtifactError(
                    f"{path} enters decode as {_shown(taken)}, {name} leaves {_shown(other)}",
                    where="graph/decode.json",
                    do=_AGAIN,
                )


def _types(graph: Graph, paths: Sequence[Name]) -> dict[str, ValueType]:
    """Recorded types of the cache among inputs or outputs, by path."""
    types, of = value_types(graph), graph.placeholder if paths is graph.inputs else graph.result
    return {path: types[of(path)] for path in paths if path.in_cache}


def _fixed(kind: ValueType) -> tuple[torch.dtype | None, list[int | None]]:
    """The dtype of a tensor, and its sizes with None for symbolic ones."""
    return kind.dtype, [size.fixed for size in kind.sizes]


class _Deriver:
    """`values` by node; tensors of equal type are one object, so that calls can be cached by operand identity."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.labels, self.types = value_labels(graph), value_types(graph)
        self.examples = {
            key.removeprefix(SIZE): value
            for key, value in graph.constants.items()
            if key.startswith(SIZE) and type(value) is int and value > 0
        }
        self.sizes: dict[str, int] = {}
        self.values: dict[fx.Node, Any] = {}
        self.tensors: dict[tuple[Any, ...], Tensor] = {}
        self.results: dict[tuple[Any, ...], Any] = {}

    def run(self) -> None:
        """Infer and compare the type of every value."""
        with torch.no_grad(), FakeTensorMode():
            for node in self.graph.nodes:
                if node.op != "output":
                    self.values[node] = self._one(self._value(node))
                    self._compare(node)
        for value in tree_leaves(self.graph.output_node.args):
            if isinstance(value, fx.Node) and self.types[value].parts is not None:
                raise self._refused(value, "several values are returned as one")

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            tensor = get_tensor(self.graph.module, str(node.target))
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        args, kwargs = map_nodes((node.args, node.kwargs), self.values.__getitem__)
        key = (node.target, _key(args), _key(kwargs))
        if key not in self.results:
            self.results[key] = self._call(node, args, kwargs)
        return self.results[key]

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The result of one operator. torch raises exceptions of many types on invalid operands."""
        target: Any = node.target
        try:
            if (rule := RULES.get(target)) is not None:
                rule.check(*rule.arguments(args, kwargs))
            result = target(*_on_cpu(args), **_on_cpu(kwargs))
        except KernelError as error:
            raise self._refused(node, error.what, error.where) from error
        except Exception as error:
            raise self._refused(node, f"{type(error).__name__}: {str(error)[:300]}", target_text(target)) from error
        if problem := _too_much(result, (args, kwargs)):
            raise self._refused(node, problem, target_text(target))
        return result

    def _input(self, node: fx.Node) -> Tensor:
        kind = self.types[node]
        if kind.dtype is None:
            raise self._refused(node, f"an input cannot be of {_shown(kind)}")
        names = {str(symbol) for size in kind.sizes for symbol in size.expression.free_symbols}
        self.sizes |= {name: self.examples[name] for name in names if name in self.examples}
        shape = [self._size(size) for size in kind.sizes]
        if any(size is None or size < 0 for size in shape):
            raise self._refused(node, f"the graph has no example of the sizes in {_shown(kind)}")
        return torch.empty(shape, dtype=kind.dtype)  # type: ignore[arg-type]

    def _one(self, value: Any) -> Any:
        """The canonical object for a tensor of this type; elementwise for a tuple."""
        if isinstance(value, Tensor):
            return self.tensors.setdefault((value.dtype, tuple(value.shape), value.stride()), value)
        return type(value)(map(self._one, value)) if is_list(value) else value

    def _compare(self, node: fx.Node) -> None:
        """Refuse a recorded type that differs from the inferred one."""
        value, kind = self.values[node], self.types[node]
        if not self._fits(value, kind):
            raise self._refused(node, f"it is recorded as {_shown(kind)} and is {_shown(type_of(value))}")

    def _fits(self, value: Any, kind: ValueType) -> bool:
        if not kind.is_known:
            return True
        if is_list(value):
            parts = kind.parts
            return parts is not None and len(parts) == len(value) and all(map(self._fits, value, parts))
        if isinstance(value, Tensor):
            alike = kind.dtype == value.dtype and len(kind.sizes) == value.dim()
            return alike and all(map(self._is_size, kind.sizes, value.shape))
        if isinstance(value, int) and not isinstance(value, bool):
            return kind.scalar is int and kind.number is not None and self._is_size(kind.number, value)
        return True

    def _is_size(self, size: Size, given: int) -> bool:
        """Whether a recorded size is the given one. A new symbol is bound to it."""
        if size.form.isidentifier() and size.form not in self.sizes:
            self.sizes[size.form] = given
        wanted = self._size(size)
        return wanted is None or wanted == given

    def _size(self, size: Size) -> int | None:
        """The value of a size, None if a symbol in it is not bound yet, -1 if it is not a whole number."""
        try:
            return size.value(self.sizes)
        except ValueError:
            return -1

    def _refused(self, node: fx.Node, what: str, operator: str | None = None) -> ArtifactError:
        path = module_path(node)
        place = [f"graph/{self.graph.name}.json, {self.labels[node]}", path, operator]
        return ArtifactError(what, where=": ".join(part for part in place if part), do=_AGAIN)


def _too_much(result: Any, operands: Any) -> str:
    """Which limit a result exceeds; "" for none."""
    counts = [each.numel() for each in tree_leaves(operands) if isinstance(each, Tensor)]
    most = min(MOST_ELEMENTS, max(MOST_MADE, MOST_GROWTH * max(counts, default=0)))
    for each in tree_leaves(result):
        if isinstance(each, Tensor) and each.numel() > max(most, *counts, 0):
            made = f"its result {_shown(type_of(each))} has {each.numel()} elements"
            return f"{made}; from these operands at most {most} are made"
        if isinstance(each, int) and not -_MOST_NUMBER <= each < _MOST_NUMBER:
            return "its result is a number of more than 64 bits"
    return ""


def _key(value: Any) -> Any:
    """Arguments as a cache key; tensors, which are canonical per type, by identity."""
    if isinstance(value, Tensor):
        return id(value)
    if is_list(value):
        return (type(value), *map(_key, value))
    if is_dict(value):
        return tuple((name, _key(each)) for name, each in value.items())
    return type(value), value if value == value else repr(value)


def _on_cpu(value: Any) -> Any:
    """Arguments with every device replaced by the CPU."""
    if isinstance(value, torch.device):
        return _CPU
    if is_list(value):
        return type(value)(map(_on_cpu, value))
    return {name: _on_cpu(each) for name, each in value.items()} if is_dict(value) else value


def _shown(kind: ValueType) -> str:
    return f"{kind}"[:80] or "no known type"
