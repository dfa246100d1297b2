"""Split a graph into a sequence of blocks, one per layer, that run one by one, with gradients if needed.

    entry       everything before the first layer (not in the list)
    block i     the nodes of layer i
    the last    the part after the layers: a final norm, a merger, a projector

Values that cross block boundaries are found by liveness analysis, so that each sample carries its masks and rotary
tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from qpcompile.ir.edit import is_call, layer_of
from qpcompile.ir.operators import QUANT_STUB, SPECS
from qpcompile.ir.program import Graph
from qpcompile.runtime.placement import Placement

Values = dict[fx.Node, Any]
# Called with a node and its value; returns the value to continue with.
Look = Callable[[fx.Node, Any], Any]

# Custom operators in plain torch, which are differentiable.
PLAIN: Mapping[object, Callable[..., Any]] = {
    spec.overload: spec.differentiable for spec in SPECS if spec.differentiable is not None
}


@dataclass(frozen=True)
class Block:
    """Nodes that run together: their live-in values, live-out values, and the values compared.

    `results` are the values that quantization changes and later blocks read, or at the end the graph's outputs. Caches
    are in neither.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    alive: frozenset[fx.Node]
    results: tuple[fx.Node, ...]

    def run(self, values: Values, on: Placement, look: Look | None = None, plain: bool = True) -> Values:
        """Live values before the block, at home or on the device -> those after it, on the device; in plain torch, or
        with the operators as they are.
        """
        return _run(self.nodes, values, self.alive, on, look, plain)


@dataclass(frozen=True)
class Entry:
    """The part of a graph before its first block."""

    graph: Graph
    nodes: tuple[fx.Node, ...]
    alive: frozenset[fx.Node]

    def run(
        self, feeds: Mapping[str, torch.Tensor], on: Placement, look: Look | None = None, plain: bool = True
    ) -> Values:
        """feeds: tensors by input path -> the live values before the first block, on the device."""
        return _run(self.nodes, _placed(self.graph, feeds), self.alive, on, look, plain)


def run_nodes(
    graph: Graph, feeds: Mapping[str, torch.Tensor], on: Placement, look: Look | None
) -> dict[str, torch.Tensor]:
    """Run a whole graph in plain torch; tensors by input path -> tensors by output path, on the device."""
    (results,) = graph.output_node.args
    assert isinstance(results, tuple)
    wanted = [node for node in results if isinstance(node, fx.Node)]
    values = _run(tuple(graph.nodes), _placed(graph, feeds), frozenset(wanted), on, look, True)
    return {path: values[node] for path, node in zip(graph.outputs, wanted, strict=True)}


def _placed(graph: Graph, feeds: Mapping[str, torch.Tensor]) -> Values:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return {node: feeds[name] for node, name in zip(placeholders, graph.inputs, strict=True)}


def split_blocks(graph: Graph) -> tuple[Entry, list[Block]]:
    """Split a graph at its layers. A graph without layers is one block."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    starts = _layer_starts(nodes)
    entry = nodes[: starts[0]] if starts else [node for node in nodes if node.op == "placeholder"]
    bounds = [*starts, len(nodes)] if starts else [len(entry), len(nodes)]
    blocks = []
    returned = _returned(graph)
    for start, end in pairwise(bounds):
        span, rest = nodes[start:end], set(nodes[end:])
        alive = _alive(nodes[:end], rest, returned)
        later = [node for node in span if set(node.users) & rest]
        ends = [node for node in span if node in returned] if end == len(nodes) else later
        moved = _stubbed_nodes(span)
        results = tuple(node for node in ends if node in moved and _is_float(node))
        layer = layer_of(span[0])
        name = graph.name if layer is None else f"{graph.name} layer {layer}"
        blocks.append(Block(name, tuple(span), alive, results))
    return Entry(graph, tuple(entry), _alive(entry, set(nodes[len(entry) :]), returned)), blocks


def _layer_starts(nodes: list[fx.Node]) -> list[int]:
    """The index where each layer begins, and where the last one ends."""
    starts, seen, last = list[int](), set[int](), -1
    for position, node in enumerate(nodes):
        layer = layer_of(node) if node.op == "call_function" else None
        if layer is None:
            continue
        if layer not in seen:
            seen.add(layer)
            starts.append(position)
        last = position
    if starts and any(node.op == "call_function" for node in nodes[last + 1 :]):
        starts.append(last + 1)
    return starts


def _alive(before: list[fx.Node], after: set[fx.Node], returned: set[fx.Node]) -> frozenset[fx.Node]:
    return frozenset(
        node for node in before if node.op != "get_attr" and (node in returned or not after.isdisjoint(node.users))
    )


def _stubbed_nodes(span: list[fx.Node]) -> set[fx.Node]:
    """The nodes of a span whose value depends on a stub."""
    moved = set[fx.Node]()
    for node in span:
        if is_call(node, QUANT_STUB) or moved & set(node.all_input_nodes):
            moved.add(node)
    return moved


def _returned(graph: Graph) -> set[fx.Node]:
    """The outputs of a graph without caches: those of all layers and samples together are larger than the weights."""
    (values,) = graph.output_node.args
    assert isinstance(values, tuple)
    paths = zip(graph.outputs, values, strict=True)
    return {node for path, node in paths if isinstance(node, fx.Node) and not path.in_cache}


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _run(
    nodes: tuple[fx.Node, ...],
    values: Values,
    alive: frozenset[fx.Node],
    on: Placement,
    look: Look | None,
    plain: bool,
) -> Values:
    known = {node: on.there(value) for node, value in values.items()}
    readers = Counter(source for node in nodes for source in node.all_input_nodes)

    def fetch(node: fx.Node) -> Any:
        if node.op == "get_attr":
            module = node.graph.owning_module
            assert module is not None
            return on.weight(module, str(node.target))
        return known[node]

    for node in nodes:
        if node.op != "call_function":
            continue
        target: Any = PLAIN.get(node.target, node.target) if plain else node.target
        args, kwargs = on.arguments(node)
        value = target(*fx.map_arg(args, fetch), **fx.map_arg(kwargs, fetch))
        known[node] = value if look is None else look(node, value)
        for source in node.all_input_nodes:
            readers[source] -= 1
            if not readers[source] and source not in alive:
                known.pop(source, None)
    return {node: known[node] for node in alive}
