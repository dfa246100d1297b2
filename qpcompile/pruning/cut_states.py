"""Cut the states that a decoder reads through cross-attention: score, select a static top-k, gather.

    prefill, before the first layer that reads %states             decode, before all layers
      %s = scores of %states : f32[B, V]                             %m = aten::index(%mask, [%rows, %kept])
      %i, %a = qpcompile::select_tokens(%s, N, %quota)               %m = aten::mul(%m, %alive)
      %states = aten::gather(%states, 1, %i)
      %mask = aten::mul(aten::index(%mask, [%rows, %i]), %a)

What is computed from states or from their masks earlier is moved after the cut, so that all of it sees N states in
place of V: keys, values and masks of every layer are shorter, and so is what decoding reads. The numbers of the kept
states, and which slots hold one, are cached beside the keys: past_states.L.cross.kept and .alive. Text is always kept.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.attention import read_attention
from qpcompile.ir.edit import aten, call, count_up, first_node_of_layer, is_call, tidy
from qpcompile.ir.liveness import Selection, gather, mask_dead
from qpcompile.ir.names import CROSS, CROSS_ALIVE, CROSS_KEPT, STATE, state
from qpcompile.ir.operators import SELECT_TOKENS
from qpcompile.ir.program import Graph
from qpcompile.ir.rematerialize import rematerialize
from qpcompile.ir.shapes import add_input, add_output, fake_mode, new_size, propagate, same, value
from qpcompile.pruning.counts import rows_quota, slots, surplus
from qpcompile.pruning.pruner import Encoded, Point, Scorer
from qpcompile.pruning.states import Inner, States, attention_over, cached_keys, entries, find_inner
from qpcompile.recipe.plan import Cut
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import COUNT, VALID, VISUAL
from qpcompile.runtime.prepare import EMBEDDINGS, PROMPT

# Sizes while graphs are rewritten: the smallest number of visual states of a row, and the slots of a step.
EXAMPLE_VISUAL, EXAMPLE_SLOTS = 3, 11


def cut_states(graph: Graph, states: States, cut: Cut, recipe: Recipe, pruner: Scorer) -> None:
    """Insert the cut into a prefill graph. Raises PlanError where something beside the states cannot be shortened."""
    if states.inner is not None:
        before, source, readers = _first(graph, states.inner), states.inner.rows, _inner_readers(states.inner)
        beside, is_flat = _inner_masks(states.inner), False
    else:
        before, source = first_node_of_layer(graph, states.layer), graph.placeholder(states.path)
        beside = {graph.placeholder(path): axis for path, axis in entries(graph, [states.count]) if path != states.path}
        is_flat = not same(value(source).shape[1], states.count)
        axes = {source: None if is_flat else 1} | beside
        readers = [(node, read) for read in axes for node in read.users if not _reads_other_axis(node, axes[read])]
    if states.of == PROMPT and not beside:
        raise _cannot(graph, source, "no mask could hide the slots of a row that keeps fewer than another")
    moved = _earlier(graph, before, {node for node, _ in readers})
    marks = _add_marks(graph, states)
    batch = call(graph, before, aten.sym_size.int, graph.placeholder(EMBEDDINGS), 0)
    rows = source
    if is_flat:
        rows = call(graph, before, aten.reshape.default, source, [batch, -1, int(value(source).shape[2])])
    total = call(graph, before, aten.sym_size.int, rows, 1)
    queries = _queries(graph, before, marks) if states.of != PROMPT else None
    alive = _alive(graph, before, rows, batch, total, beside, queries)
    visual = marks[VISUAL] if states.of == PROMPT else alive
    point = Point(graph, before, cut, recipe, visual, alive, None, alive, value(rows).shape[1], visual)
    point = replace(point, encoded=_encoded(point, states, rows, total, queries, moved))
    smallest = call(graph, before, aten.sym_size.int, marks[COUNT], 0) if states.of == PROMPT else total
    if recipe.tokens.multiple_of > 1:
        point = replace(point, surplus=surplus(point, total, smallest))
    stays = slots(point, total, smallest)
    quota = rows_quota(point, alive, point.call(aten.bitwise_and.Tensor, visual, alive))
    pair = point.call(SELECT_TOKENS, pruner.scores(point), stays, quota)
    index, filled = (point.call(operator.getitem, pair, place) for place in (0, 1))
    selection = Selection(index, filled, stays, batch)
    shorter = {source: gather(graph, before, rows, [1], selection)}
    shorter |= {node: _shortened(graph, before, node, axis, selection) for node, axis in beside.items()}
    if states.inner is not None:
        readers += states.inner.sizes
        shorter |= {size: stays for _, size in states.inner.sizes}
    for node in moved:
        before.prepend(node)
    for node, read in readers:
        node.replace_input_with(read, shorter[read])
    add_output(graph, state(states.layer, CROSS_KEPT), index)
    add_output(graph, state(states.layer, CROSS_ALIVE), filled)
    propagate(graph, index)
    tidy(graph)


def cut_states_decode(graph: Graph) -> None:
    """Shorten what a decode graph reads beside the caches of cross-attention, which prefill gives it cut."""
    cached = [graph.placeholder(path) for path in graph.inputs if path.root == STATE and path.part.startswith(CROSS)]
    inner = find_inner(graph) if not cached else None
    found = entries(graph, [value(node).shape[2] for node in cached])
    beside = {graph.placeholder(path): axis for path, axis in found if graph.placeholder(path).users}
    readers = [(node, read) for read in beside for node in read.users if not _reads_other_axis(node, beside[read])]
    if inner is not None:
        beside, readers = {inner.rows: 1} | _inner_masks(inner), _inner_readers(inner)
    batch, count = value(graph.placeholder(EMBEDDINGS)).shape[0], new_size(graph, CROSS_KEPT, EXAMPLE_SLOTS)
    with fake_mode(graph):
        for node in cached:
            given, sizes = value(node), list(value(node).shape)
            node.meta["val"] = given.new_empty((*sizes[:2], count, *sizes[3:]))
    layer = cached_keys(graph.inputs)[0].layer if cached else 0
    kept = add_input(graph, state(layer, CROSS_KEPT), (batch, count), torch.int64)
    alive = add_input(graph, state(layer, CROSS_ALIVE), (batch, count), torch.bool)
    first = next(node for node in graph.nodes if node.op == "call_function") if inner is None else _first(graph, inner)
    rows, stays = (call(graph, first, aten.sym_size.int, kept, axis) for axis in (0, 1))
    selection = Selection(kept, alive, stays, rows)
    shorter = {node: _shortened(graph, first, node, axis, selection) for node, axis in beside.items()}
    if inner is not None:
        readers += inner.sizes
        shorter |= {size: stays for _, size in inner.sizes}
    for node, read in readers:
        node.replace_input_with(read, shorter[read])
    add_output(graph, state(layer, CROSS_KEPT), kept)
    add_output(graph, state(layer, CROSS_ALIVE), alive)
    propagate(graph)
    tidy(graph)


def _first(graph: Graph, inner: Inner) -> fx.Node:
    """The first node that reads states which the graph computes. What it reads of masks is there before it."""
    nodes = graph.nodes
    first = min(inner.readers, key=nodes.index)
    if late := [node for node in _inner_masks(inner) if nodes.index(node) > nodes.index(first)]:
        raise _cannot(graph, late[0], "it is computed after the keys")
    return first


def _inner_masks(inner: Inner) -> dict[fx.Node, int]:
    """The masks of attention over states that the graph computes, and their axis of states."""
    masks = (read_attention(node).mask for node in inner.attention)
    return {mask: 3 for mask in masks if mask is not None}


def _inner_readers(inner: Inner) -> list[tuple[fx.Node, fx.Node]]:
    """Each node that reads such states for attention, or such a mask in it, with what it reads."""
    masks = ((node, read_attention(node).mask) for node in inner.attention)
    return [
        *((node, inner.rows) for node in inner.readers),
        *((node, mask) for node, mask in masks if mask is not None),
    ]


def _reads_other_axis(node: fx.Node, axis: int | None) -> bool:
    """Whether a node reads the size of another axis than the one that is cut; None: all sizes change."""
    return axis is not None and is_call(node, aten.sym_size.int) and bool(node.args[1] != axis)


def _earlier(graph: Graph, before: fx.Node, readers: set[fx.Node]) -> list[fx.Node]:
    """The nodes before a place that are among `readers`, or computed from one."""
    nodes, found = graph.nodes, set(readers)
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return [node for node in nodes[: nodes.index(before)] if node in found]


def _add_marks(graph: Graph, states: States) -> dict[str, fx.Node]:
    """The inputs that say which tokens of a prompt are visual: of the encoder's, or of the decoder's, with padding."""
    embeds, source = value(graph.placeholder(EMBEDDINGS)), value(graph.placeholder(states.path))
    batch, length = embeds.shape[:2]
    if states.of == PROMPT:
        smallest = new_size(graph, COUNT, EXAMPLE_VISUAL)
        return {
            VISUAL: add_input(graph, VISUAL, (batch, source.shape[1]), torch.bool),
            COUNT: add_input(graph, COUNT, (smallest,), torch.int64),
        }
    return {name: add_input(graph, name, (batch, length), torch.bool) for name in (VISUAL, VALID)}


def _queries(graph: Graph, before: fx.Node, marks: dict[str, fx.Node]) -> fx.Node:
    """The tokens that pictures are shown to, bool[B, S]: from the first visual one on, all where there is none.

    Masks of tokens before the first picture say nothing: some families open them, and discard the result.
    """
    begun = call(graph, before, aten.gt.Scalar, call(graph, before, aten.cumsum.default, marks[VISUAL], 1), 0)
    none = call(graph, before, aten.bitwise_not.default, call(graph, before, aten.any.dim, marks[VISUAL], 1, True))
    shown = call(graph, before, aten.bitwise_or.Tensor, begun, none)
    return call(graph, before, aten.bitwise_and.Tensor, shown, marks[VALID])


def _alive(
    graph: Graph,
    before: fx.Node,
    rows: fx.Node,
    batch: fx.Node,
    total: fx.Node,
    beside: dict[fx.Node, int],
    queries: fx.Node | None,
) -> fx.Node:
    """The states that some token sees, bool[B, V]: others are padding, or of pictures that are missing."""
    alive = call(graph, before, aten.ones.default, [batch, total], dtype=torch.bool, device=value(rows).device)
    for mask, axis in beside.items():
        tensor = value(mask)
        if tensor.ndim == 2 and axis == 1 and not tensor.is_floating_point():
            seen = call(graph, before, aten.ne.Scalar, mask, 0)
        elif tensor.ndim == 4 and axis == 3 and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            least = torch.finfo(tensor.dtype).min / 2 if tensor.is_floating_point() else 0
            seen = call(graph, before, aten.gt.Scalar, mask, least)
            if queries is not None:
                among = call(graph, before, aten.unsqueeze.default, queries, 1)
                among = call(graph, before, aten.unsqueeze.default, among, 3)
                seen = call(graph, before, aten.bitwise_and.Tensor, seen, among)
            seen = call(graph, before, aten.any.dim, call(graph, before, aten.any.dim, seen, 2), 1)
        else:
            raise _cannot(graph, mask, f"its shape {tuple(tensor.shape)} is not that of a mask")
        places = [_rows(graph, before, batch, mask), _columns(graph, before, total, mask)]
        alive = call(
            graph, before, aten.bitwise_and.Tensor, alive, call(graph, before, aten.index.Tensor, seen, places)
        )
    return alive


def _rows(graph: Graph, before: fx.Node, batch: fx.Node, like: fx.Node) -> fx.Node:
    """i64[B, 1]: the number of each row."""
    return call(graph, before, aten.unsqueeze.default, count_up(graph, before, batch, value(like).device), 1)


def _columns(graph: Graph, before: fx.Node, total: fx.Node, like: fx.Node) -> fx.Node:
    """i64[1, V]: the number of each state. An index by it has V entries, whatever symbol a trace has for that."""
    return call(graph, before, aten.unsqueeze.default, count_up(graph, before, total, value(like).device), 0)


def _encoded(
    point: Point, states: States, rows: fx.Node, total: fx.Node, queries: fx.Node | None, moved: list[fx.Node]
) -> Encoded:
    """What methods may read of states; values that the graph computes later, or of cut masks, are computed here."""
    graph, before, nodes = point.graph, point.before, point.graph.nodes
    later = {*nodes[nodes.index(before) :], *moved}
    known: dict[fx.Node, fx.Node] = {}

    def early(node: fx.Node) -> fx.Node:
        return rematerialize(graph, node, before, known, later.__contains__)

    node = attention_over(graph, states)
    attention = None
    if node is not None:
        read = read_attention(node)
        mask = None if read.mask is None else early(read.mask)
        if mask is not None:
            columns = count_up(graph, before, total, value(mask).device)
            mask = call(graph, before, aten.index_select.default, mask, 3, columns)
        key = early(read.key)
        attention = replace(read, query=early(read.query), key=key, value=key, mask=mask)
    return Encoded(rows, states.linear, attention, queries)


def _shortened(graph: Graph, before: fx.Node, node: fx.Node, axis: int, selection: Selection) -> fx.Node:
    """A tensor with an entry for each state, of the kept ones; a mask of them hides slots without one."""
    tensor = value(node)
    if tensor.ndim == 2 and axis == 1 and not tensor.is_floating_point():
        places = [_rows(graph, before, selection.batch, node), selection.index]
        short = call(graph, before, aten.index.Tensor, node, places)
        own = call(graph, before, aten.to.dtype, selection.alive, tensor.dtype)
        return call(graph, before, aten.mul.Tensor, short, own)
    if not same(tensor.shape[0], value(selection.batch)) or axis == 0:
        raise _cannot(graph, node, f"its shape {tuple(tensor.shape)} has no batch axis")
    short = gather(graph, before, node, [axis], selection)
    if tensor.ndim == 4 and axis == 3:
        return mask_dead(graph, before, short, selection.alive, tensor.dtype)
    if tensor.ndim == 3 and axis == 1 and tensor.is_floating_point():
        return short
    raise _cannot(graph, node, f"its shape {tuple(tensor.shape)} is not that of a mask")


def _cannot(graph: Graph, node: fx.Node, reason: str) -> PlanError:
    return PlanError(
        f"{node.name}, which cross-attention reads, cannot be cut: {reason}",
        where=f"{graph.name}, tokens.method",
        do="write tokens.method none, and report this family",
    )
