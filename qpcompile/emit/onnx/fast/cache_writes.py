"""Split fused writes of caches and attention steps into parts, which fast graphs replace one by one (attention.py)."""

from __future__ import annotations

import operator

from torch import fx

from qpcompile.emit.onnx.edit import calls, put
from qpcompile.emit.onnx.wrap import Part
from qpcompile.ir.edit import aten
from qpcompile.ir.operators import (
    ATTENTION_KV,
    ATTENTION_STEP,
    HADAMARD,
    KV_WRITE,
    ROPE,
    ROPE_KV_APPEND,
    ROPE_KV_WRITE,
    TRANSFORM_QUANTIZE,
)


def split_cache_writes(part: Part) -> None:
    """Replace every fused write by rope, hadamard, kv_write and cat, and a step by a write, attention and quantizer."""
    for node in calls(part, ATTENTION_STEP):
        _replace(part, node, _attended(part, node))
    for node in calls(part, ROPE_KV_WRITE, ROPE_KV_APPEND):
        _replace(part, node, _parts(part, node))


def _replace(part: Part, node: fx.Node, results: list[fx.Node]) -> None:
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        part.module.graph.erase_node(user)
    part.module.graph.erase_node(node)


def _attended(part: Part, node: fx.Node) -> list[fx.Node]:
    """The results of one attention_step: codes and steps of its heads, and the four parts of the cache."""
    operands, (mask, scale, *epilogue) = node.args[:13], node.args[13:]
    append = put(part, node, ROPE_KV_APPEND, *operands, like=node)
    query, *cache = (put(part, node, operator.getitem, append, index, like=node) for index in range(5))
    y = put(part, node, ATTENTION_KV, query, *cache, mask, scale, *operands[6:8], like=node)
    y = put(part, node, aten.flatten.using_ints, put(part, node, aten.transpose.int, y, 1, 2, like=node), 2, like=node)
    pair = put(part, node, TRANSFORM_QUANTIZE, y, *epilogue, like=node)
    return [*(put(part, node, operator.getitem, pair, index, like=node) for index in range(2)), *cache]


def _parts(part: Part, node: fx.Node) -> list[fx.Node]:
    """The results of one fused write: queries, codes and scales of keys, and of values."""
    query, key, held, cos, sin, rotate, k_bits, v_bits, *rest = node.args
    appends = node.target is ROPE_KV_APPEND
    past, center = (rest[:4], rest[4:]) if appends else ([], rest)
    turned = [query, key]
    if cos is not None:
        turned = [put(part, node, ROPE, each, cos, sin, like=node) for each in turned]
    if rotate:
        turned = [put(part, node, HADAMARD, each, None, like=node) for each in turned]
    if center and center[0] is not None:
        turned[1] = put(part, node, aten.sub.Tensor, turned[1], center[0], like=node)
    written = [put(part, node, KV_WRITE, each, bits, like=node) for each, bits in ((turned[1], k_bits), (held, v_bits))]
    new = [put(part, node, operator.getitem, pair, index, like=node) for pair in written for index in range(2)]
    if past:
        joined = zip(past, new, strict=True)
        new = [put(part, node, aten.cat.default, [old, each], 2, like=node) for old, each in joined]
    return [turned[0], *new]  # type: ignore[list-item]
