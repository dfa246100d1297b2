"""Renumber tokens after a cut: recompute position-dependent values of later layers from new position ids.

    %cos = f(%position_ids)  ->  %new = cumsum(%alive) - 1;  %cos' = f(%new)     for the readers after the cut

Rotary embeddings are relative, so a family's first position number does not matter. Masks are not recomputed: a window
still applies to the original distances.
"""

from __future__ import annotations

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.edit import aten, call
from qpcompile.ir.liveness import crossings
from qpcompile.ir.program import Graph
from qpcompile.ir.rematerialize import readers_of, rematerialize
from qpcompile.ir.shapes import same, value

POSITIONS, EMBEDDINGS = "position_ids", "inputs_embeds"


def find_positions(graph: Graph) -> fx.Node:
    """The position ids input, i64[B, S]; PlanError if there is none, or one with several position axes."""
    if POSITIONS not in graph.inputs:
        raise _cannot(graph, f"the graph has no input {POSITIONS}")
    node = graph.placeholder(POSITIONS)
    if value(node).ndim != 2:
        raise _cannot(
            graph, f"positions have {value(node).ndim} dimensions: tokens have places in pictures, not numbers"
        )
    return node


def numbered(graph: Graph, place: fx.Node, alive: fx.Node) -> fx.Node:
    """alive: bool[B, N] -> i64[B, N]: live tokens numbered from 0 in order."""
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
    """Make readers at and after `point` of values computed from the positions `old` read them recomputed from `new`.

    length: the number of tokens of the sequence, an axis of attention masks, which are kept. count: the length of
    `new`, None if equal to that of `old`. Copies are inserted before `place` (default: `point`). PlanError if nothing
    that layers read depends on `old`.
    """
    from_old = readers_of(graph, [old])
    # Which tokens are alive depends on the data; values computed from position numbers alone do not.
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
        raise _cannot(graph, f"nothing that the layers after {point.name} read is computed from {POSITIONS} alone")


def _is_size(node: fx.Node, length: torch.SymInt) -> bool:
    size = node.meta.get("val")
    return node.op == "call_function" and isinstance(size, torch.SymInt) and same(size, length)


def _is_rotary(node: fx.Node, length: torch.SymInt) -> bool:
    """Whether a value is a rotary table: floating point with a last axis that is not tokens, unlike attention masks."""
    tensor = value(node)
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not same(tensor.shape[-1], length)


def _cannot(graph: Graph, reason: str) -> PlanError:
    return PlanError(
        f"kept tokens cannot be renumbered: {reason}",
        where=f"{graph.name}, tokens.position_mode reindex",
        do="write position_mode: retain",
    )
