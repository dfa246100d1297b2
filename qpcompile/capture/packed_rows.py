"""Features that a decoder adds to the rows of a mask become a sum over all tokens, which a token cut can gather.

    %r = aten::index(%h, [squeeze(%mask)])         %z = aten::zeros_like(%inputs_embeds)
    %s = aten::add(%r, %features)            ->    %d = aten::masked_scatter(%z, %mask, %features)
    %y = aten::masked_scatter(%h, %mask, %s)       %y = aten::add(%h, %d)

The features are packed, f[V, C], in the order of the mask's rows: dropping tokens from the mask alone would give the
ones that remain the features of others. Without a token in the mask there may be no features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpcompile.ir.edit import aten, call, calls, is_call
from qpcompile.ir.program import Graph
from qpcompile.ir.rematerialize import readers_of
from qpcompile.ir.shapes import same, value
from qpcompile.runtime.prepare import EMBEDDINGS

_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)


@dataclass(frozen=True)
class _Packed:
    """hidden: f[B, S, C], mask: bool[B, S, 1] and features: f[V, C], both inputs; rows: the selected ones of hidden."""

    hidden: fx.Node
    mask: fx.Node
    features: fx.Node
    rows: fx.Node


def spread_packed_rows(graph: Graph) -> int:
    """Rewrite a traced decoder; returns the number of sums."""
    found = [(node, packed) for node in calls(graph, aten.masked_scatter.default) if (packed := _packed(graph, node))]
    for node, packed in found:
        first = next(each for each in graph.nodes if each.op == "call_function")
        blank = call(graph, first, aten.zeros_like.default, graph.placeholder(EMBEDDINGS))
        spread = call(graph, first, aten.masked_scatter.default, blank, packed.mask, packed.features)
        node.replace_all_uses_with(call(graph, node, aten.add.Tensor, packed.hidden, spread))
        # With the rows go the checks of their number.
        for reader in [each for each in reversed(graph.nodes) if each in readers_of(graph, [packed.rows])]:
            graph.module.graph.erase_node(reader)
    if found:
        graph.module.recompile()
    return len(found)


def _packed(graph: Graph, node: fx.Node) -> _Packed | None:
    hidden, mask, source = node.args[0], _uncast(node.args[1]), node.args[2]
    if EMBEDDINGS not in graph.inputs or not is_call(source, aten.view.default) or source.args[1] != [-1]:
        return None
    total = source.args[0]
    if not is_call(total, aten.add.Tensor) or total.kwargs or not is_call(total.args[0], aten.index.Tensor):
        return None
    rows, features = total.args[0], _uncast(total.args[1])
    picked = rows.args[1]
    assert isinstance(hidden, fx.Node) and isinstance(picked, (list, tuple))
    narrow = picked[0] if len(picked) == 1 else None
    if not is_call(narrow, aten.squeeze.dim) or narrow.args[1] != -1 or _uncast(narrow.args[0]) is not mask:
        return None
    if rows.args[0] is not hidden or mask is None or features is None or not _fits(graph, hidden, mask, features):
        return None
    return _Packed(hidden, mask, features, rows)


def _fits(graph: Graph, hidden: fx.Node, mask: fx.Node, features: fx.Node) -> bool:
    """Whether mask and features are inputs, and the hidden states have the shape and type of the embeddings."""
    held, embeds, packed = (value(each) for each in (hidden, graph.placeholder(EMBEDDINGS), features))
    alike = held.ndim == embeds.ndim and all(map(same, held.shape, embeds.shape))
    is_input = mask.op == features.op == "placeholder"
    return is_input and alike and held.dtype == embeds.dtype == packed.dtype and packed.ndim == 2


def _uncast(node: object) -> fx.Node | None:
    """What casts to the same type, which tracing leaves behind, stand for."""
    while is_call(node, *_CASTS):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if value(source).dtype != value(node).dtype:
            break
        node = source
    return node if isinstance(node, fx.Node) else None
