"""Record and replay of decode steps: the kernel calls of a bound decode graph are recorded once, replayed by one C
call.

    front    masks, rotary tables, all that does not depend on layers     torch, on every step
    layers   C kernels, residual adds, views, appends to caches           one call that replays the recording

An answer's first decode step runs node by node, which gives every cache spare capacity. The second is recorded: the
kernels' calls are captured (kernels/native/tape.py) and the tensors they created are kept. Later steps copy the front's
results to the addresses of the recording, and replay it. When a cache is full the cycle starts over. Results are
bit-identical to running node by node.

Caches from elsewhere (beam search, a second answer) run node by node, and so does a graph whose layers contain an
operator without a recordable kernel: `TapedDecode.problem` names it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from qpcompile.ir.edit import aten, get_tensor, is_call
from qpcompile.ir.operators import SPECS
from qpcompile.ir.program import Graph
from qpcompile.ir.text import target_text
from qpcompile.ir.types import BATCH, UNKNOWN, ValueType, value_types
from qpcompile.kernels.attention_kv.cpu import attention_kv
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.tape import Tape
from qpcompile.runtime.cpu.row_plans import IS_ROWS
from qpcompile.runtime.growing_cache import GrowingCaches

KERNELS: tuple[Any, ...] = tuple(spec.cpu for spec in SPECS if spec.taped)
VIEWS: tuple[Any, ...] = (
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints),
    *(aten.transpose.int, aten.unsqueeze.default),
)
COMPUTES_NOTHING = frozenset({"empty", "view", "transpose", "unsqueeze", "expand", "slice", "alias", "as_strided"})
"""torch operators that allocate memory or create views."""


class CannotTapeError(Exception):
    """Why a graph or a step cannot be recorded, in words; never leaves this file."""


class TapedDecode:
    """A bound decode graph, called with its inputs in their order.

    `problem` is the reason why every step runs node by node; empty if steps are replayed.
    """

    def __init__(self, graph: Graph, caches: GrowingCaches) -> None:
        self.module, self.problem = graph.module, ""
        self._inputs = [place for place, path in enumerate(graph.inputs) if path.in_cache]
        self._grown = [graph.outputs.index(graph.inputs[place]) for place in self._inputs]
        self._last: list[Tensor] = []
        self._step: _Step | None = None
        try:
            self._layers = _Layers(graph, caches)
        except CannotTapeError as problem:
            self.problem = str(problem)

    def __call__(self, *feeds: Tensor) -> Sequence[Tensor]:
        """One step; returns the results in the order of the graph's outputs."""
        results = None if self.problem else self._on_own_caches(feeds)
        if results is None:
            self._step = None
            results = self.module(*feeds)
        self._last = [] if self.problem else [results[place] for place in self._grown]
        return results

    def _on_own_caches(self, feeds: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """A step that continues the last one, replayed or recorded; None if neither is possible."""
        pasts = [feeds[place] for place in self._inputs]
        # A caller may hold older caches and continue from them: appending to those is not safe.
        last, self._last = self._last, []
        if len(pasts) != len(last) or any(map(operator.is_not, pasts, last)):
            return None
        values = self._layers.front(*feeds)
        if self._step is not None:
            return self._step.replay(values)
        try:
            self._step = self._layers.record(values, pasts)
        except CannotTapeError as problem:
            self.problem = str(problem)
        return None if self._step is None else self._step.results()


class _Layers:
    """A bound decode graph split in two: `front` computes what the layers read besides weights and caches."""

    def __init__(self, graph: Graph, caches: GrowingCaches) -> None:
        if not native.available():
            raise CannotTapeError(native.library().problem)
        self._module, self._caches = graph.module, caches
        types = value_types(graph)
        self._nodes = list(_kernels_and_readers(graph.module.graph, caches))
        inside = set(self._nodes)
        self._pasts = [graph.placeholder(path) for path in graph.inputs if path.in_cache]
        for node in self._nodes:
            if problem := _obstacle(node, types, caches, self._pasts):
                raise CannotTapeError(problem)
        if not self._pasts:
            raise CannotTapeError("no cache grows from step to step")
        read = dict.fromkeys(source for node in self._nodes for source in node.all_input_nodes if source not in inside)
        self._weights = [node for node in read if node.op == "get_attr"]
        self._read = [node for node in read if node.op != "get_attr" and node not in self._pasts]
        self._axes = [_growing_axis(node, types[node], inside) for node in self._read]
        (results,) = graph.output_node.args
        assert isinstance(results, tuple)
        self._results = [node for node in results if isinstance(node, fx.Node) and node in inside]
        if len(self._results) < len(results):
            raise CannotTapeError("the graph returns a value that its layers do not compute")
        self.front = self._make_front(inside)

    def _make_front(self, inside: Collection[fx.Node]) -> fx.GraphModule:
        own, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self._module.graph.nodes:
            if node.op != "output" and node not in inside:
                copies[node] = own.node_copy(node, copies.__getitem__)
        own.output(tuple(copies[node] for node in self._read))
        own.eliminate_dead_code()
        return fx.GraphModule(self._module, own)

    def record(self, values: Sequence[Any], pasts: Sequence[Tensor]) -> _Step | None:
        """Run and record one step; None if a cache has no room for it.

        values: the results of `front`. pasts: the caches returned by the previous step.
        """
        caches = {node: _Cache.of(past, self._caches) for node, past in zip(self._pasts, pasts, strict=True)}
        left = min(cache.left for cache in caches.values())
        if left < 1:
            return None
        inputs = [_Input.of(value, axis, left) for value, axis in zip(values, self._axes, strict=True)]
        known: dict[fx.Node, Any] = {node: get_tensor(self._module, str(node.target)) for node in self._weights}
        known |= {node: each.now for node, each in zip(self._read, inputs, strict=True)}
        with native.noted() as calls, _NothingElse():
            for node in self._nodes:
                if node.target == self._caches.append:
                    known[node] = caches[node.args[0]].append(known[node.args[1]])  # type: ignore[index]
                elif is_call(node, aten.add.Tensor):
                    known[node] = _sum(*(known[each] for each in node.args))  # type: ignore[index]
                else:
                    args = fx.map_arg(node.args, known.__getitem__)
                    known[node] = node.target(*args, **fx.map_arg(node.kwargs, known.__getitem__))  # type: ignore[operator]
        appended = {node: caches[node.args[0]] for node in self._nodes if node.target == self._caches.append}  # type: ignore[index]
        results = [appended[node] if node in appended else known[node] for node in self._results]
        return _Step(Tape(calls), inputs, results, left - 1, list(known.values()))


@dataclass(frozen=True)
class _Step:
    """A recorded step. `results` may be read until the next replay."""

    tape: Tape
    inputs: list[_Input]
    outputs: list[_Cache | Tensor]
    room: int
    kept: list[Any]

    def replay(self, values: Sequence[Any]) -> list[Tensor] | None:
        """Replay the next step on the results of the front; None if this tape does not fit it."""
        fits = self.tape.replays < self.room and self.tape.threads == torch.get_num_threads()
        if not fits or not all(map(_Input.put, self.inputs, values)):
            return None
        self.tape.replay()
        return self.results()

    def results(self) -> list[Tensor]:
        """The results of the step; copies, except for the caches."""
        more = self.tape.replays
        return [each.grown(more) if isinstance(each, _Cache) else each.clone() for each in self.outputs]


@dataclass(frozen=True)
class _Cache:
    """A cache and its buffer: past: [B, H, S, D], the front of room: [B, H, S + left, D]."""

    past: Tensor
    room: Tensor
    left: int

    @classmethod
    def of(cls, past: Tensor, caches: GrowingCaches) -> _Cache:
        """Take exclusive ownership of the cache's buffer."""
        room = caches.take(past)
        return cls(past, past, 0) if room is None else cls(past, room, room.shape[2] - past.shape[2])

    def append(self, token: Tensor) -> Tensor:
        """Append token: [B, H, 1, D]."""
        batch, heads, _, width = self.room.shape
        if not token.is_contiguous() or token.shape != (batch, heads, 1, width) or token.dtype != self.room.dtype:
            raise CannotTapeError(f"a cache is given tokens {list(token.shape)} with another memory layout")
        native.call("append", token, self.room, batch * heads, width, self.room.shape[2], self.past.shape[2])
        return self.grown(0)

    def grown(self, more: int) -> Tensor:
        """The cache with the token of the first step and of `more` later steps."""
        return self.room.narrow(2, 0, self.past.shape[2] + 1 + more)


@dataclass(frozen=True)
class _Input:
    """Where the layers read a value of the front: a constant number, or a tensor with spare capacity along one axis."""

    now: Any
    axis: int
    whole: Tensor | None = None

    @classmethod
    def of(cls, value: Any, axis: int, left: int) -> _Input:
        """The input for a value that may grow by `left` along an axis."""
        if not isinstance(value, Tensor):
            return cls(value, axis)
        sizes = list(value.shape)
        sizes[axis] += left
        whole = value.new_zeros(sizes)
        return cls(whole.narrow(axis, 0, value.shape[axis]).copy_(value), axis, whole)

    def put(self, value: Any) -> bool:
        """Store the value of another step; False if it does not fit."""
        if self.whole is None:
            return value == self.now
        length = value.shape[self.axis]
        sizes = list(self.now.shape)
        sizes[self.axis] = length
        fits = list(value.shape) == sizes and length <= self.whole.shape[self.axis]
        if fits:
            self.whole.narrow(self.axis, 0, length).copy_(value)
        return fits


class _NothingElse(TorchDispatchMode):
    """Refuses every torch operator that computes: the tape would miss it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in place of each operator."""
        if func._schema.name.removeprefix("aten::") not in COMPUTES_NOTHING:
            raise CannotTapeError(f"{func._schema.name} runs between the kernels of a layer")
        return func(*args, **(kwargs or {}))


def _sum(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape or not (x.is_contiguous() and y.is_contiguous()):
        raise CannotTapeError(f"a sum of {list(x.shape)} and {list(y.shape)} has no form in C")
    total = torch.empty(x.shape, dtype=x.dtype)
    native.call("add", x, y, total)
    return total


def _kernels_and_readers(graph: fx.Graph, caches: GrowingCaches) -> Iterator[fx.Node]:
    """Every kernel and every append of a graph, and all nodes that depend on one."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        first = node.op == "call_function" and (node.target in (*KERNELS, caches.append) or IS_ROWS in node.meta)
        if node.op != "output" and (first or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
            yield node


def _obstacle(node: fx.Node, types: dict[fx.Node, ValueType], caches: GrowingCaches, pasts: Collection[fx.Node]) -> str:
    """Why a node after the front cannot be recorded; empty if it can."""
    appends = node.target == caches.append
    if not appends and any(source in pasts for source in node.all_input_nodes):
        return f"{target_text(node.target)} reads a cache before a token is appended to it"
    if is_call(node, aten.add.Tensor):
        alike = len({types.get(each, UNKNOWN) for each in (node, *node.args)}) == 1 and len(node.args) == 2  # type: ignore[arg-type]
        known = alike and not node.kwargs and types[node].dtype in (torch.float32, torch.bfloat16)
    elif is_call(node, aten.slice.Tensor):
        (source,), axis = node.all_input_nodes[:1], node.args[1]
        sizes = types.get(source, UNKNOWN).sizes
        # Of channels, not of tokens: their number grows from replay to replay.
        known = isinstance(axis, int) and axis < len(sizes) and sizes[axis].fixed is not None
    else:
        known = appends or IS_ROWS in node.meta or node.target in (*KERNELS, *VIEWS, operator.getitem)
    return "" if known else f"{target_text(node.target)} in the layers has no kernel in C for a decode step"


def _growing_axis(node: fx.Node, kind: ValueType, inside: Collection[fx.Node]) -> int:
    """The axis along which a value of the front grows on every step, 0 if there is none."""
    if kind.number == BATCH:
        return 0
    growing = [place for place, size in enumerate(kind.sizes) if size.fixed is None and size != BATCH]
    masks = all(is_call(user, attention_kv) and user.args[5] is node for user in node.users if user in inside)
    if kind.dtype is None or len(growing) > 1 or (growing and not masks):
        raise CannotTapeError(f"the layers read a value of type {str(kind) or 'unknown'} that changes on every step")
    return growing[0] if growing else 0
