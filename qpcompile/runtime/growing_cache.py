"""Caches that grow in place: a new token is appended within spare capacity.

    %k = aten::cat([%past_key_values.0.key, %new], 2)     copies the whole cache on every step
      -> %k = append(%past_key_values.0.key, %new)        writes one token; the result is a view one token longer

Results are identical. On a GPU `attention_kv` requires contiguous codes, so a cache of codes would be copied in any
case and is not rewritten. Beam search reorders rows, which copies the cache too.
"""

from __future__ import annotations

import operator
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from qpcompile.ir.edit import aten, calls, is_call
from qpcompile.ir.names import Name
from qpcompile.ir.operators import ATTENTION_KV, ATTENTION_STEP, ROPE_KV_APPEND, ROPE_KV_WRITE, TRANSFORM_QUANTIZE
from qpcompile.ir.program import Graph
from qpcompile.ir.types import TYPE, UNKNOWN, ValueType, value_types

# Spare capacity given to a full cache: this many tokens, or a quarter of its length.
ROOM = 64


class GrowingCaches:
    """Tracks which tensors are the filled front of a larger buffer that is exclusively theirs."""

    def __init__(self) -> None:
        self._rooms: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()

    def append(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """past: [B, H, S, D], new: [B, H, N, D] -> [B, H, S + N, D]; `past` itself keeps its values."""
        # A second append to the same cache finds no spare capacity and copies it.
        room = self._rooms.pop(past, None)
        start, end = past.shape[2], past.shape[2] + new.shape[2]
        if room is None or room.shape[2] < end:
            batch, heads, _, width = past.shape
            room = past.new_empty(batch, heads, end + max(ROOM, end // 4), width)
            room[:, :, :start] = past
        room[:, :, start:end] = new
        grown = room[:, :, :end]
        self._rooms[grown] = room
        return grown

    def take(self, grown: torch.Tensor) -> torch.Tensor | None:
        """Hand the buffer of `grown` over to the caller: `append` copies `grown` from now on."""
        return self._rooms.pop(grown, None)


def grow_in_place(graph: Graph, caches: GrowingCaches, packed_codes: bool) -> int:
    """Rewrite appends to the caches of a decode graph, except those read by `attention_kv` if it needs contiguous
    codes; returns the number of rewrites.
    """
    if not packed_codes:
        split_appends(graph)
    found = appends(graph)
    if packed_codes:
        found = [node for node in found if not any(is_call(user, ATTENTION_KV) for user in node.users)]
    for node in found:
        node.args = tuple(node.args[0])  # type: ignore[arg-type]
        node.target = caches.append
    return len(found)


def split_appends(graph: Graph) -> None:
    """Split rope_kv_append in rope_kv_write and appends, which buffers with spare capacity take over.

    %w = rope_kv_append(..., %past, ...)    becomes    %w = rope_kv_write(...)
    getitem(%w, 1)                                      cat([%past, getitem(%w, 1)], 2)

    attention_step is that between two other operators.
    """
    types = value_types(graph)
    for node in list(calls(graph, ATTENTION_STEP)):
        _split_step(graph, node, types)
    types = value_types(graph)
    for node in list(calls(graph, ROPE_KV_APPEND)):
        operands, (k_codes, k_affine, v_codes, v_affine), center = node.args[:8], node.args[8:12], node.args[12:]
        with graph.module.graph.inserting_before(node):
            write = graph.module.graph.call_function(ROPE_KV_WRITE, (*operands, *center))
        tokens = types[operands[1]].sizes[2]  # type: ignore[index]
        for user in list(node.users):
            index = user.args[1]
            user.args = (write, index)
            if index == 0:
                continue
            past = (k_codes, k_affine, v_codes, v_affine)[int(index) - 1]  # type: ignore[arg-type]
            assert isinstance(past, fx.Node)
            with graph.module.graph.inserting_before(user):
                new = graph.module.graph.call_function(operator.getitem, (write, index))
            sizes = types[past].sizes
            new.meta[TYPE] = ValueType(types[past].dtype, (*sizes[:2], tokens, *sizes[3:]))
            user.target, user.args = aten.cat.default, ([past, new], 2)
        graph.module.graph.erase_node(node)


def _split_step(graph: Graph, node: fx.Node, types: dict[fx.Node, ValueType]) -> None:
    """Replace attention_step by rope_kv_append, attention_kv and transform_quantize."""
    operands, (mask, scale, *epilogue) = node.args[:13], node.args[13:]
    query, kinds = types[operands[0]], types[node].parts  # type: ignore[index]
    assert kinds is not None
    batch, heads, tokens, size = query.sizes

    def put(target: Any, *args: Any, kind: ValueType = UNKNOWN) -> fx.Node:
        made = graph.module.graph.call_function(target, args)
        made.meta[TYPE] = kind
        return made

    with graph.module.graph.inserting_before(node):
        append = put(ROPE_KV_APPEND, *operands)
        parts: list[fx.Node] = [
            put(operator.getitem, append, at, kind=kind) for at, kind in enumerate((query, *kinds[2:]))
        ]
        y = put(ATTENTION_KV, *parts, mask, scale, *operands[6:8], kind=query)
        y = put(aten.transpose.int, y, 1, 2, kind=ValueType(query.dtype, (batch, tokens, heads, size)))
        y = put(aten.flatten.using_ints, y, 2, kind=ValueType(query.dtype, kinds[0].sizes))
        if query.dtype == torch.float64:
            # The operator rounds between its parts.
            y = put(aten.to.dtype, y, torch.float32, kind=ValueType(torch.float32, kinds[0].sizes))
            y = put(aten.to.dtype, y, torch.float64, kind=ValueType(torch.float64, kinds[0].sizes))
        pair = put(TRANSFORM_QUANTIZE, y, *epilogue)
    for user in list(node.users):
        index: Any = user.args[1]
        if index < 2:
            user.args = (pair, index)
        else:
            user.replace_all_uses_with(parts[int(index) - 1])
            graph.module.graph.erase_node(user)
    graph.module.graph.erase_node(node)


def appends(graph: Graph) -> list[fx.Node]:
    """The nodes cat([cached, new], 2) that are returned as caches."""
    (results,) = graph.output_node.args
    assert isinstance(results, tuple)
    named = zip(graph.outputs, results, strict=True)
    stored = {node for path, node in named if path.in_cache and isinstance(node, fx.Node)}
    return [node for node in calls(graph, aten.cat.default) if node in stored and _appends_to_cache(graph, node)]


def _appends_to_cache(graph: Graph, node: fx.Node) -> bool:
    """Whether a node is cat([cached, new], 2)."""
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or axis not in (2, -2):
        return False
    past = parts[0]
    return isinstance(past, fx.Node) and past.op == "placeholder" and _path(graph, past).in_cache


def _path(graph: Graph, placeholder: fx.Node) -> Name:
    return graph.inputs[[node for node in graph.nodes if node.op == "placeholder"].index(placeholder)]
