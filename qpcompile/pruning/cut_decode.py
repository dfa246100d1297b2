"""Rewrite the decode graph for caches with per-layer lengths.

The traced graph has one length s for all layers. After the cut at layer l the layers have t - 1 cached tokens, t = size
of `kept.l` (the new token's position is its last entry). Positions and masks are built from the full length as before
and gathered at the kept positions, so masks that depend on distance (windows) stay correct.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from qpcompile.ir.edit import aten, call, calls, first_node_of_layer, tidy
from qpcompile.ir.liveness import Selection, reduce_tokens
from qpcompile.ir.names import STATE, Name
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import add_input, fake_mode, new_size, propagate, same, token_axes, value
from qpcompile.pruning.positions import find_positions, renumber
from qpcompile.runtime.machine import ALIVE, KEPT, SEEN

EXAMPLE_SLOTS = 23


@dataclass(frozen=True)
class _Stage:
    """Layers from `first` up to, excluding, `last` (None: to the end), which attend over the tokens kept by one cut."""

    cut: int
    first: int
    last: int | None

    def holds(self, layer: int) -> bool:
        """Whether the layer belongs to the stage."""
        return self.first <= layer and (self.last is None or layer < self.last)


def cut_decode(graph: Graph, cuts: Sequence[int], offset: int, reindex: bool = False) -> None:
    """Give every layer of the decode graph the cache length that prefill produces for it.

    cuts: layers after which tokens are dropped, ascending. offset: 0 if the scored layer's own cache is compacted, 1 if
    compaction starts with the next layer. reindex: tokens are renumbered after each cut; the scored layer's keys have
    the positions from before the cut in both cases.
    """
    past = _free_full_length(graph)
    # A cut before the decoder has no scored layer: layer 0 is the first with a short cache in both cases.
    firsts = [max(0, cut + offset) for cut in cuts]
    stages = [_Stage(cut, first, last) for cut, first, last in zip(cuts, firsts, [*firsts[1:], None], strict=True)]
    points = {stage.cut: first_node_of_layer(graph, stage.first) for stage in stages}
    place = points[cuts[0]]
    inputs = {stage.cut: _add_stage_inputs(graph, stage, past) for stage in stages}
    # Last stage first: the readers of later stages are already replaced when an earlier stage looks for its own.
    for stage in reversed(stages):
        kept, alive = inputs[stage.cut]
        _shorten(graph, points[stage.cut], place, past, kept, alive)
        if reindex:
            _renumber(graph, stage.cut, place, past, alive)
    propagate(graph, place)
    tidy(graph)


def _free_full_length(graph: Graph) -> torch.SymInt:
    """Read the full length from the input `tokens_seen` instead of a cache tensor; returns it."""
    past = value(next(graph.placeholder(path) for path in graph.inputs if path.in_cache)).shape[2]
    caches = _caches(graph, past)
    seen = add_input(graph, SEEN, (past,), torch.int64)
    first = next(node for node in graph.nodes if node.op == "call_function")
    size = call(graph, first, aten.sym_size.int, seen, 0)
    for node in list(calls(graph, aten.sym_size.int)):
        if node.args[0] in caches and node.args[1] in token_axes(node.args[0], past):
            node.replace_all_uses_with(size)
            graph.module.graph.erase_node(node)
    return past


def _caches(graph: Graph, past: torch.SymInt) -> dict[fx.Node, Name]:
    """The inputs with an entry for every cached token: keys and values, and the keys that a layer chooses tokens by."""
    found = {graph.placeholder(path): path for path in graph.inputs if path.in_cache or path.root == STATE}
    return {node: path for node, path in found.items() if path.in_cache or token_axes(node, past)}


def _add_stage_inputs(graph: Graph, stage: _Stage, past: torch.SymInt) -> tuple[fx.Node, fx.Node]:
    """The inputs `kept.l` and `alive.l`, i64 and bool [B, t]; the stage's caches become t - 1 long."""
    batch = value(graph.placeholder("inputs_embeds")).shape[0]
    slots = new_size(graph, f"{KEPT}.{stage.cut}", EXAMPLE_SLOTS - stage.cut % 8)
    kept = add_input(graph, f"{KEPT}.{stage.cut}", (batch, slots), torch.int64)
    alive = add_input(graph, f"{ALIVE}.{stage.cut}", (batch, slots), torch.bool)
    for node, path in _caches(graph, past).items():
        if stage.holds(path.layer):
            shape = [slots - 1 if same(size, past) else size for size in value(node).shape]
            with fake_mode(graph):
                node.meta["val"] = torch.empty(shape, dtype=value(node).dtype, device=value(node).device)
    return kept, alive


def _renumber(graph: Graph, cut: int, place: fx.Node, past: torch.SymInt, alive: fx.Node) -> None:
    """Renumber: in the layers after the cut, the new token's position is the number of tokens cached there."""
    counts = call(graph, place, aten.sum.dim_IntList, alive, [1], True)
    new = call(graph, place, aten.sub.Tensor, counts, 1)
    renumber(graph, first_node_of_layer(graph, cut + 1), find_positions(graph), new, past + 1, place=place)


def _shorten(graph: Graph, point: fx.Node, place: fx.Node, past: torch.SymInt, kept: fx.Node, alive: fx.Node) -> None:
    """From `point`, the first node of a stage, on: gather values of the full length at the kept positions."""
    batch = call(graph, place, aten.sym_size.int, kept, 0)
    slots = call(graph, place, aten.sym_size.int, kept, 1)
    before = call(graph, place, operator.sub, slots, 1)
    caches = [graph.placeholder(path) for path in graph.inputs if path.in_cache or path.root == STATE]
    lengths = [(past + 1, Selection(kept, alive, slots, batch)), (past, Selection(kept, alive, before, batch))]
    reduce_tokens(graph, point, lengths, skip=[*caches, kept, alive, batch, slots, before], place=place)
