"""Rematerialization: recompute a subgraph at an earlier place, or with some of its inputs replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx

from qpcompile.ir.edit import call, map_nodes
from qpcompile.ir.node_facts import set_fact, stub_fact
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import value


def rematerialize(
    graph: Graph,
    target: fx.Node,
    before: fx.Node,
    known: dict[fx.Node, fx.Node],
    copied: Callable[[fx.Node], bool],
    bypass: Collection[object] = (),
) -> fx.Node:
    """Recompute `target` before the node `before`; returns the node to use there.

    Of the transitive inputs of `target`, nodes in `known` are replaced by their mapping, nodes for which `copied` holds
    are copied, and all others are used unchanged. Copies are added to `known`, so that a second call shares them. Calls
    of an operator in `bypass` are replaced by their first argument.
    """
    for node in needed_for(graph, target, lambda each: each not in known and copied(each)):
        if node.target in bypass:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            known[node] = known.get(source, source)
            continue
        known[node] = _copy(graph, node, before, known)
    return known.get(target, target)


def readers_of(graph: Graph, sources: Collection[fx.Node], border: fx.Node | None = None) -> set[fx.Node]:
    """The `sources` and all nodes that transitively depend on one of them, except through the node `border`."""
    found = set(sources)
    for node in graph.nodes:
        if node is not border and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def needed_for(graph: Graph, target: fx.Node, follow: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The operators and tensors that `target` transitively depends on, itself included, in graph order.

    The search continues through nodes for which `follow` holds and stops at the others.
    """
    found: set[fx.Node] = set()
    waiting = [target]
    while waiting:
        node = waiting.pop()
        if node not in found and node.op in ("call_function", "get_attr") and follow(node):
            found.add(node)
            waiting += node.all_input_nodes
    return [node for node in graph.nodes if node in found]


def _copy(graph: Graph, node: fx.Node, before: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.op == "get_attr":
        with graph.module.graph.inserting_before(before):
            copy = graph.module.graph.get_attr(str(node.target))
        copy.meta["val"] = value(node)
        return copy
    args, kwargs = map_nodes((node.args, node.kwargs), lambda each: known.get(each, each))
    copy = call(graph, before, node.target, *args, like=node, **kwargs)
    if fact := stub_fact(node):
        copy.meta["val"] = value(node)
        set_fact(copy, fact)
    return copy
