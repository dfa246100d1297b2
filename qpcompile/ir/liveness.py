"""Liveness at a point of a graph, and the reduction of live values to a subset of tokens.

A token cut is model-agnostic: every value that is defined before the point, read after it and has a token axis is
gathered on those axes; every symbolic size that counts tokens is replaced by the new count.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.edit import aten, call
from qpcompile.ir.program import Graph
from qpcompile.ir.rematerialize import needed_for
from qpcompile.ir.shapes import expression, same, token_axes, value


@dataclass(frozen=True)
class Crossing:
    """A value that is live at a point, and its readers after it."""

    node: fx.Node
    readers: tuple[fx.Node, ...]


def crossings(graph: Graph, point: fx.Node) -> list[Crossing]:
    """Every value defined before `point` and read at or after it by something other than the output node."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    border = order[point]
    found: list[Crossing] = []
    for node in graph.nodes[:border]:
        readers = tuple(user for user in node.users if order[user] >= border and user.op != "output")
        if readers and node.op != "get_attr":
            found.append(Crossing(node, readers))
    return found


@dataclass(frozen=True)
class Selection:
    """The tokens kept at a point: indices i64[B, N], which slots are alive bool[B, N], and N as a node."""

    index: fx.Node
    alive: fx.Node
    count: fx.Node
    batch: fx.Node


def reduce_tokens(
    graph: Graph,
    point: fx.Node,
    lengths: Sequence[tuple[torch.SymInt, Selection]],
    skip: Sequence[fx.Node] = (),
    place: fx.Node | None = None,
) -> None:
    """Gather every live value at `point` that has an axis of one of the `lengths`, and replace equal sizes.

    New nodes are inserted before `place` (default: `point`) if the value is defined there already. Raises PlanError if
    a size depends on a length in a way that cannot be replaced.
    """
    for length, selection in lengths:
        _give_rows(graph, point, length, selection)
    order = {node: index for index, node in enumerate(graph.nodes)}
    for crossing in crossings(graph, point):
        if crossing.node in skip:
            continue
        early = place is not None and order[crossing.node] < order[place]
        replacement = _reduced(graph, place if early and place is not None else point, crossing.node, lengths)
        if replacement is not None:
            for reader in crossing.readers:
                reader.replace_input_with(crossing.node, replacement)


def _give_rows(graph: Graph, point: fx.Node, length: torch.SymInt, selection: Selection) -> None:
    """Move readers of values that are the same for every row, f[S], before `point`, until they have a batch axis.

    After a cut every row has tokens of its own, for which such a value has no axis. Readers of a tensor that is
    computed after the point stay where they are.
    """
    waiting = crossings(graph, point)
    while waiting:
        crossing = waiting.pop()
        if not _lacks_rows(crossing.node, length, selection):
            continue
        for reader in crossing.readers:
            nodes = graph.nodes
            later = set(nodes[nodes.index(point) :])
            moved = needed_for(graph, reader, later.__contains__)
            if point in moved or any(node is not reader and _is_computed(node) for node in moved):
                continue
            for node in moved:
                point.prepend(node)
                # It is no longer part of the layer that it was traced in.
                node.meta.pop("nn_module_stack", None)
            waiting.append(Crossing(reader, tuple(user for user in reader.users if user.op != "output")))


def _is_computed(node: fx.Node) -> bool:
    """Whether an operator computes a tensor; the others are sizes and weights."""
    return node.op == "call_function" and not isinstance(value(node), torch.SymInt)


def _lacks_rows(node: fx.Node, length: torch.SymInt, selection: Selection) -> bool:
    """Whether a tensor has an axis of tokens, and neither one of the batch nor a first one of size 1 in its place."""
    axes, batch = token_axes(node, length), value(selection.batch)
    return bool(axes) and all(not same(size, batch) for size in value(node).shape) and not _is_one_row(node, axes)


def _is_one_row(node: fx.Node, axes: Sequence[int]) -> bool:
    return same(value(node).shape[0], 1) and 0 not in axes


def _reduced(
    graph: Graph, place: fx.Node, node: fx.Node, lengths: Sequence[tuple[torch.SymInt, Selection]]
) -> fx.Node | None:
    """The replacement of `node` after the cut, or None if it does not depend on tokens."""
    current: Any = value(node)
    for length, selection in lengths:
        if isinstance(current, torch.SymInt) and same(current, length):
            return selection.count
        if isinstance(current, torch.Tensor) and (axes := token_axes(node, length)):
            reduced = gather(graph, place, node, axes, selection)
            is_mask = current.ndim == 4 and axes[-1] == 3
            if is_mask:
                return mask_dead(graph, place, reduced, selection.alive, current.dtype)
            return _padding(graph, place, reduced, selection.alive) if _is_padding(graph, node) else reduced
        if isinstance(current, torch.Tensor) and _is_flat(current, length, selection):
            rows = call(graph, place, aten.view.default, node, [selection.batch, -1, *_sizes(graph, place, node, 1)])
            reduced = gather(graph, place, rows, [1], selection)
            return call(graph, place, aten.flatten.using_ints, reduced, 0, 1)
    if isinstance(current, torch.SymInt) and any(_depends(current, length) for length, _ in lengths):
        return _size_after(graph, place, node, lengths)
    return None


def _is_flat(tensor: torch.Tensor, length: torch.SymInt, selection: Selection) -> bool:
    """Whether the first axis counts the tokens of all rows: layers of experts flatten them."""
    batch = value(selection.batch)
    return tensor.ndim > 1 and expression(tensor.shape[0]) == expression(batch) * expression(length)


def _sizes(graph: Graph, place: fx.Node, node: fx.Node, first: int) -> list[object]:
    """The sizes of a tensor's axes from `first` on: numbers, or nodes."""
    return [
        call(graph, place, aten.sym_size.int, node, axis) if isinstance(size, torch.SymInt) else size
        for axis, size in enumerate(value(node).shape)
        if axis >= first
    ]


def _is_padding(graph: Graph, node: fx.Node) -> bool:
    """Whether a value is the mask of real tokens [B, S] or [B, S, 1] that layers with a state multiply by."""
    while node.op == "call_function" and node.target in (aten.to.dtype, aten.unsqueeze.default):
        node = node.args[0]  # type: ignore[assignment]
    return "attention_mask" in graph.inputs and node is graph.placeholder("attention_mask") and value(node).ndim == 2


def _padding(graph: Graph, place: fx.Node, mask: fx.Node, alive: fx.Node) -> fx.Node:
    """A mask of real tokens without those in dead slots."""
    own = call(graph, place, aten.to.dtype, alive, value(mask).dtype)
    for _ in range(value(mask).ndim - 2):
        own = call(graph, place, aten.unsqueeze.default, own, -1)
    return call(graph, place, aten.mul.Tensor, mask, own)


def _size_after(
    graph: Graph, place: fx.Node, node: fx.Node, lengths: Sequence[tuple[torch.SymInt, Selection]]
) -> fx.Node:
    """A size computed from the number of tokens, of those that are kept. PlanError if it depends on another number."""
    known: dict[Any, fx.Node] = {}
    for length, selection in lengths:
        known[expression(length)] = selection.count
        known[expression(value(selection.batch))] = selection.batch
    made = _arithmetic(graph, place, expression(value(node)), known)
    if not isinstance(made, fx.Node):
        raise _cannot_cut(graph, place, node, f"its size is {expression(value(node))}")
    return made


def _arithmetic(graph: Graph, place: fx.Node, size: Any, known: dict[Any, fx.Node]) -> fx.Node | int | None:
    """The nodes that compute an expression of known sizes; None where it has another."""
    if size in known:
        return known[size]
    if size.is_Integer:
        return int(size)
    operation: dict[str, Any] = {
        "Add": operator.add,
        "Mul": operator.mul,
        "FloorDiv": operator.floordiv,  # pyright: ignore[reportUnknownMemberType]
        "Mod": operator.mod,
        "Min": torch.sym_min,  # pyright: ignore[reportUnknownMemberType]
        "Max": torch.sym_max,  # pyright: ignore[reportUnknownMemberType]
    }
    compute = operation.get(type(size).__name__)
    parts = [_arithmetic(graph, place, part, known) for part in size.args]
    if compute is None or not parts or any(part is None for part in parts):
        return None
    made = parts[0]
    for part in parts[1:]:
        made = call(graph, place, compute, made, part)
    return made


def gather(graph: Graph, point: fx.Node, node: fx.Node, axes: Sequence[int], selection: Selection) -> fx.Node:
    """`node` reduced to the selected tokens on each of `axes`; the batch axis is the first of size B (or 1)."""
    current = value(node)
    batch = value(selection.batch)
    rows = [axis for axis, size in enumerate(current.shape) if same(size, batch)]
    if not rows:
        if not _is_one_row(node, axes):
            raise _cannot_cut(graph, point, node, f"its shape {tuple(current.shape)} has no batch axis")
        sizes = [selection.batch, *[-1] * (current.ndim - 1)]
        node = call(graph, point, aten.expand.default, node, sizes)
        rows = [0]
    for axis in axes:
        index = selection.index
        for position in range(current.ndim):
            if position not in (rows[0], axis):
                index = call(graph, point, aten.unsqueeze.default, index, position)
        sizes: list[object] = []
        for position, size in enumerate(current.shape):
            if position == axis:
                sizes.append(-1)
            elif position == rows[0]:
                sizes.append(selection.batch)
            elif isinstance(size, torch.SymInt):
                sizes.append(call(graph, point, aten.sym_size.int, node, position))
            else:
                sizes.append(size)
        index = call(graph, point, aten.expand.default, index, sizes)
        node = call(graph, point, aten.gather.default, node, axis, index)
    return node


def mask_dead(graph: Graph, point: fx.Node, mask: fx.Node, alive: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Mask out keys without a token in an attention mask [B, 1, ..., N].

    Boolean masks are True for visible keys; float masks are added to the scores.
    """
    keys = call(graph, point, aten.unsqueeze.default, call(graph, point, aten.unsqueeze.default, alive, 1), 1)
    if dtype == torch.bool:
        return call(graph, point, aten.bitwise_and.Tensor, mask, keys)
    dead = call(graph, point, aten.bitwise_not.default, keys)
    return call(graph, point, aten.masked_fill.Scalar, mask, dead, torch.finfo(dtype).min)


def _depends(size: torch.SymInt, length: torch.SymInt) -> bool:
    symbols = getattr(expression(size), "free_symbols", set[Any]())
    return bool(symbols & expression(length).free_symbols)


def _cannot_cut(graph: Graph, point: fx.Node, node: fx.Node, reason: str) -> PlanError:
    return PlanError(
        f"tokens cannot be cut at this layer: {node.name} is live there and {reason}",
        where=f"{graph.name}, before {point.name}",
        do="choose other tokens.candidate_layers",
    )
