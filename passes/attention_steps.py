"""Fuse a decode step's attention with the append in front of it and the quantizer behind it, into attention_step."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from qpcompile.ir.edit import aten, call, is_call
from qpcompile.ir.operators import ATTENTION_STEP, QUANTIZE_DYNAMIC, ROPE_KV_APPEND, TRANSFORM_QUANTIZE
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import value

PLAIN = (None, False, None, None, None)
"""The transform of quantize_dynamic, as an epilogue has it."""
RESHAPES = (aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.contiguous.default)


def fuse_step(graph: Graph, attention: fx.Node) -> bool:
    """Fuse one attention_kv; False if its cache is not appended in front of it, or a value has another reader."""
    append, quantize = _append(graph, attention), _quantizer(attention)
    if append is None or quantize is None:
        return False
    mask, scale = attention.args[5:7]
    past, center = append.args[8:12], append.args[12] if len(append.args) > 12 else None
    epilogue = quantize.args[1:] if is_call(quantize, TRANSFORM_QUANTIZE) else (*PLAIN, *quantize.args[1:])
    operands = (*append.args[:8], *past, center, mask, scale, *epilogue)
    new = call(graph, quantize, ATTENTION_STEP, *operands, like=attention)
    parts = [call(graph, quantize, operator.getitem, new, index, like=attention) for index in range(2, 6)]
    for old, part in zip(attention.args[1:5], parts, strict=True):
        old.replace_all_uses_with(part, lambda user: user is not attention)  # type: ignore[union-attr]
    quantize.replace_all_uses_with(new)
    return True


def _append(graph: Graph, attention: fx.Node) -> fx.Node | None:
    """The append whose results an attention reads, in order, and nothing else but the graph's results does."""
    parts: list[Any] = list(attention.args[:5])
    if len(attention.args) > 9 or not all(is_call(part, operator.getitem) for part in parts):
        return None
    append = parts[0].args[0]
    in_order = all(part.args == (append, index) for index, part in enumerate(parts))
    readers = {user for part in parts for user in part.users} - {attention, graph.output_node}
    return append if is_call(append, ROPE_KV_APPEND) and in_order and not readers else None


def _quantizer(attention: fx.Node) -> fx.Node | None:
    """The only reader of an attention's result, with the heads of a token side by side: [B, S, H D]."""
    batch, heads, tokens, size = value(attention).shape
    split, joined = [(batch, heads, tokens, size)], [(batch, tokens, heads, size), (batch, tokens, heads * size)]
    node, shapes = attention, split
    while len(node.users) == 1:
        (reader,) = node.users
        if is_call(reader, TRANSFORM_QUANTIZE, QUANTIZE_DYNAMIC):
            return reader if _text(value(node).shape) == _text(joined[1]) else None
        axes: Any = reader.args[1:]
        if is_call(reader, aten.transpose.int) and shapes is split and sorted(axis % 4 for axis in axes) == [1, 2]:
            shapes = joined
        elif not is_call(reader, *RESHAPES):
            return None
        if _text(value(reader).shape) not in map(_text, shapes):
            return None
        node = reader
    return None


def _text(shape: Any) -> list[str]:
    return [str(size) for size in shape]
