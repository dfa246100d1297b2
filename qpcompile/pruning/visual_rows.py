"""Trace rows of a value through a graph: which rows at the start make up each row at the end.

A row is one token: all axes but the last count rows. Norms, linears and activations keep rows; reshapes, indexing and
permutations move rows or merge several into one. The same operators, applied to a table of row indices, yield the
mapping:

    %a : f32[T, 72]                                    %t = arange(T) as [T, 1]
    %b = aten::view(%a, [-1, 288]) : f32[T/4, 288]     %t = aten::view(%t, [-1, 4])
    %c = aten::linear(%b, @weight) : f32[T/4, 144]
    %d = aten::index(%c, [%order]) : f32[T/4, 144]     %t = aten::index(%t, [%order])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.edit import aten, call, count_up, operands
from qpcompile.ir.operators import ATTENTION_KV, SEGMENT_ATTENTION
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import same, value

# Keys of a vision graph's constants, written by capture: the output whose rows become the visual tokens of the
# sequence, and how many leading rows of each picture the model drops (a class token).
OUTPUT, SKIPPED = "visual_output", "skipped_rows"

# Operators that compute each row from the same row of their inputs.
_ROWWISE = frozenset(
    {
        aten.linear.default,
        aten.layer_norm.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.gelu.default,
        aten.silu.default,
        aten.relu.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.to.dtype,
        aten.contiguous.default,
        aten.clone.default,
        aten.dropout.default,
    }
)
_ATTENTION = (ATTENTION_KV, SEGMENT_ATTENTION)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def follow_rows(graph: Graph, start: fx.Node, end: fx.Node) -> fx.Node | None:
    """The indices of start's rows, counted over all axes but the last, that make up each row of `end`.

    Returns: i64[*rows of end, G], or None if `end` has the rows of `start` in order. New nodes are appended to the
    graph. Raises PlanError for an unsupported operator that mixes rows.
    """
    nodes = graph.nodes
    wanted = _ancestors(end)
    tables: dict[fx.Node, fx.Node | None] = {start: None}
    for node in nodes[nodes.index(start) + 1 : nodes.index(end) + 1]:
        sources = [source for source in node.all_input_nodes if source in tables]
        is_size = not isinstance(node.meta.get("val"), torch.Tensor)
        if not sources or node not in wanted or is_size:
            continue
        found = {tables[source] for source in sources}
        if len(found) > 1:
            raise _lost(graph, node)
        if _is_rowwise(node, sources):
            tables[node] = tables[sources[0]]
        else:
            table = tables[sources[0]] or _numbers(graph, start)
            tables[node] = _moved(graph, node, sources[0], table)
    if end not in tables:
        raise _lost(graph, end)
    return tables[end]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def _is_rowwise(node: fx.Node, sources: list[fx.Node]) -> bool:
    ours = getattr(node.target, "namespace", "") == "qpcompile" and node.target not in _ATTENTION
    if not ours and node.target not in _ROWWISE:
        return False
    rows = value(node).shape[:-1]
    return all(_same_sizes(value(source).shape[:-1], rows) for source in sources)


def _same_sizes(left: torch.Size, right: torch.Size) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def _numbers(graph: Graph, start: fx.Node) -> fx.Node:
    """i64[*rows of start, 1]: 0, 1, 2, ... row after row."""
    before = graph.output_node
    sizes = [call(graph, before, aten.sym_size.int, start, axis) for axis in range(value(start).ndim - 1)]
    flat = call(graph, before, aten.reshape.default, start, [-1, int(value(start).shape[-1])])
    count = call(graph, before, aten.sym_size.int, flat, 0)
    numbers = count_up(graph, before, count, value(start).device)
    return call(graph, before, aten.reshape.default, numbers, [*sizes, 1])


def _moved(graph: Graph, node: fx.Node, source: fx.Node, table: fx.Node) -> fx.Node:
    """Apply the row movement of `node` on `source` to its index table. The last axis must be kept, or grow."""
    if node.args[0] is not source or node.kwargs or not _keeps_last_axis(node, value(source).ndim):
        raise _lost(graph, node)
    rest = list(node.args[1:])
    if node.target in _RESHAPES:
        sizes = list(rest[0])  # type: ignore[arg-type]
        rest = [[*sizes[:-1], _groups(graph, node, source, table, sizes[-1])]]
    return call(graph, graph.output_node, node.target, table, *rest)


def _keeps_last_axis(node: fx.Node, rank: int) -> bool:
    """Whether a movement keeps each row's channels together on the last axis."""
    target, rest = node.target, list(node.args[1:])
    if target in (*_RESHAPES, aten.flatten.using_ints):
        return True
    if target is aten.index.Tensor:
        return len(rest[0]) < rank  # type: ignore[arg-type]
    axes: list[Any]
    if target in (aten.index_select.default, aten.slice.Tensor, aten.select.int, aten.squeeze.dim):
        axes = [operands(node)["dim"]]
    elif target is aten.transpose.int:
        axes = rest
    elif target is aten.unsqueeze.default:
        return rest[0] not in (-1, rank)
    elif target is aten.permute.default:
        return rest[0][-1] % rank == rank - 1  # type: ignore[index, operator]
    else:
        return False
    return all(axis % rank != rank - 1 for axis in axes)


def _groups(graph: Graph, node: fx.Node, source: fx.Node, table: fx.Node, last: Any) -> int:
    """How many rows of the start one row holds after a reshape to `last` channels."""
    before, after = value(source).shape[-1], value(node).shape[-1]
    after = last if isinstance(last, int) and last > 0 else after
    held = int(value(table).shape[-1])
    if not isinstance(before, int) or not isinstance(after, int) or held * after % before:
        raise _lost(graph, node)
    return held * after // before


def _lost(graph: Graph, node: fx.Node) -> PlanError:
    return PlanError(
        f"the patches cannot be traced from the tower's attention to its output through {node.target}",
        where=f"{graph.name}, {node.name}",
        do="choose a tokens.method that does not read the vision tower: quota, random",
    )
