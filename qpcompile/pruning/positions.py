"""Give the tokens behind a cut new positions: what layers read as positions is computed again, from other numbers.

    %cos = f(%position_ids)  ->  %new = cumsum(%alive) - 1;  %cos' = f(%new)     for the readers behind the cut

Rotary positions are relative, so it does not matter where a family begins to count. Masks are not computed again: a
window stays one over the original distances.
"""

from __future__ import annotations

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.edit import aten, call
from qpcompile.ir.liveness import crossings
from qpcompile.ir.program import Graph
from qpcompile.ir.rematerialize import rematerialize, readers_of
from qpcompile.ir.shapes import same, value

POSITIONS, EMBEDDINGS = "position_ids", "inputs_embeds"


def find_positions(graph: Graph) -> fx.Node:
    """The input that numbers the tokens, i64[B, S]; PlanError where there is none, or one with several axes."""
    if POSITIONS not in graph.inputs:
        raise _cannot(graph, f"the graph has no input {POSITIONS}")
    node = graph.placeholder(POSITIONS)
    if value(node).ndim != 2:
        raise _cannot(
            graph, f"positions have {value(node).ndim} dimensions: tokens have places in pictures, not numbers"
        )
    return node


def numbered(graph: Graph, place: fx.Node, alive: fx.Node) -> fx.Node:
    """alive: bool[B, N] -> i64[B, N]: living tokens counted from 0 in their order."""
    return call(graph, place, aten.sub.Tensor, call(graph, place, aten.cumsum.default, alive, 1), 1)


def renumber(
    graph: Graph,
    point: fx.Node,
    old: fx.Node,
    new: fx.Node,
    length: torch.SymInt,
    count: fx.Node | None = None,
    place: fx.Node | None = None,
) -> None:
    """Readers at and behind `point` of what is computed from the positions `old` get it computed from `new`.

    length: the number of tokens of the sequence, an axis of attention masks, which stay. count: how many `new` has,
    None where that is as many as `old` has. Copies go before `place` (default: `point`). PlanError where nothing that
    layers read depends on `old`.
    """
    from_old = readers_of(graph, [old])
    # Which tokens are alive follows from what they hold; what is computed from their numbers alone does not.
    mixed = readers_of(graph, [graph.placeholder(EMBEDDINGS)], border=old)
    known = {old: new}
    if count is not None:
        known |= {node: count for node in graph.nodes if _is_size(node, length) and node is not count}
    found = False
    for crossing in crossings(graph, point):
        node = crossing.node
        if node not in from_old or node in mixed or not (node is old or _is_rotary(node, length)):
            continue
        again = rematerialize(graph, node, place or point, known, from_old.__contains__)
        for reader in crossing.readers:
            reader.replace_input_with(node, again)
        found = True
    if not found:
        raise _cannot(graph, f"nothing that the layers behind {point.name} read is computed from {POSITIONS} alone")


def _is_size(node: fx.Node, length: torch.SymInt) -> bool:
    size = node.meta.get("val")
    return node.op == "call_function" and isinstance(size, torch.SymInt) and same(size, length)


def _is_rotary(node: fx.Node, length: torch.SymInt) -> bool:
    """Sines, cosines and angles are numbers whose last axis is not one of tokens; attention masks are not."""
    tensor = value(node)
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not same(tensor.shape[-1], length)


def _cannot(graph: Graph, reason: str) -> PlanError:
    return PlanError(
        f"kept tokens cannot be counted anew: {reason}",
        where=f"{graph.name}, tokens.position_mode reindex",
        do="write position_mode: retain",
    )
