"""One part of a graph as nodes and edges for the drawing, and its lines of the printed graph (`ir/text.py`).

Size computations (`int`, `bool` scalars) are omitted: they would obscure the data flow.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from qpcompile.errors import InvariantError
from qpcompile.ir.program import Graph
from qpcompile.ir.text import part_of, target_text, value_labels
from qpcompile.ir.types import value_types


@dataclass(frozen=True)
class Node:
    """One value: its operator (or input), weights and type; `outside`: computed elsewhere; `leaves`: read elsewhere."""

    name: str
    operator: str
    weights: tuple[str, ...]
    type: str
    sources: tuple[str, ...]
    outside: bool = False
    leaves: tuple[str, ...] = ()


def layer_text(text: str, part: str) -> str:
    """The lines of a printed graph that belong to `part` (`layers.3`), unchanged."""
    found, owner = [], ""
    for line in text.splitlines():
        if line.startswith("# "):
            owner = line.removeprefix("# ")
        elif owner == part and not line.startswith("return "):
            found.append(line)
    return "".join(f"{line}\n" for line in found)


def layer_names(graph: Graph) -> list[str]:
    """The numbered parts of a graph, in order, each once."""
    return list(dict.fromkeys(name for name in _owners(graph).values() if name.rpartition(".")[2].isdigit()))


def layer_nodes(graph: Graph, part: str) -> list[Node]:
    """Nodes of `part` in order of definition, the values it reads from elsewhere first.

    Raises InvariantError for a graph without that part.
    """
    owners, labels, types = _owners(graph), value_labels(graph), value_types(graph)
    drawn = {node for node, kind in types.items() if node.op != "get_attr" and kind.scalar is None}
    inside = [node for node, owner in owners.items() if owner == part and node in drawn]
    if not inside:
        raise InvariantError(f"the graph has no part called {part}", where=graph.name)
    read = dict.fromkeys(source for node in inside for source in node.all_input_nodes)
    outside = [source for source in read if owners.get(source) != part and source in drawn]
    shown, leaves = {*inside, *outside}, _leaves(graph, part, owners)
    inputs = dict(zip((node for node in graph.nodes if node.op == "placeholder"), graph.inputs, strict=True))
    found = [
        Node(labels[node], inputs.get(node) or _operator(node), (), str(types[node]), (), True) for node in outside
    ]
    for node in inside:
        weights = dict.fromkeys(str(source.target) for source in node.all_input_nodes if source.op == "get_attr")
        sources = tuple(labels[source] for source in node.all_input_nodes if source in shown)
        leaving = leaves.get(node, ())
        found.append(Node(labels[node], _operator(node), tuple(weights), str(types[node]), sources, leaves=leaving))
    return found


def _owners(graph: Graph) -> dict[fx.Node, str]:
    """The part that each call belongs to, as in the printed graph: a call traced in no module continues a part."""
    found: dict[fx.Node, str] = {}
    owner = ""
    for node in graph.nodes:
        if node.op == "call_function":
            owner = found[node] = part_of(node) or owner
    return found


def _leaves(graph: Graph, part: str, owners: Mapping[fx.Node, str]) -> dict[fx.Node, tuple[str, ...]]:
    """The outputs that return a value; (`""`,) for a value that is not returned, but read by other parts."""
    elsewhere = [reader for reader, owner in owners.items() if owner != part]
    paths: dict[fx.Node, list[str]] = {source: [] for reader in elsewhere for source in reader.all_input_nodes}
    (returned,) = graph.output_node.args
    assert isinstance(returned, (tuple, list))
    for path, value in zip(graph.outputs, returned, strict=True):
        assert isinstance(value, fx.Node)
        paths.setdefault(value, []).append(path)
    return {node: tuple(found) or ("",) for node, found in paths.items()}


def _operator(node: fx.Node) -> str:
    return f"item {node.args[1]}" if node.target is operator.getitem else target_text(node.target)
