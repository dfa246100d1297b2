"""Fuse what happens to queries, keys and values between their projection and attention on a cache of codes.

    rope(%q), rope(%k)                             becomes   %w = rope_kv_write(%q, %k, %v, %cos, %sin, True, 8, 4)
    hadamard(%q'), hadamard(%k')                             getitem(%w, 0), ..., getitem(%w, 4)
    [%k'' - @center]
    kv_write(%k'', 8), kv_write(%v, 4)

    decode: cat([%past, ...], 2) of the four parts           %w = rope_kv_append(..., %past, ...)
    of the cache as well

    decode: attention_kv on these and the quantizer of       %w = attention_step(..., %past, ..., %mask, ...)
    its heads as well

Without rotary embeddings that queries and keys share, only the rotation is fused, and without the rotation only the
embeddings. Results are bit-identical for float32 models; in half precision they round where the separate operators do.
A value with another reader is not fused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.ir.edit import aten, call, calls, is_call, tidy
from qpcompile.ir.near_miss import NearMiss, note_misses
from qpcompile.ir.operators import ATTENTION_KV, HADAMARD, KV_WRITE, ROPE, ROPE_KV_APPEND, ROPE_KV_WRITE
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.passes.attention_steps import fuse_step
from qpcompile.stages import Stage

TYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = ("codes of keys", "scales of keys", "codes of values", "scales of values")


class _MissError(Exception):
    """Why one attention's writes are not fused, in words; never leaves this file."""


@dataclass(frozen=True)
class FuseCacheWrites:
    """See the module's docstring."""

    name: ClassVar[str] = "fuse_cache_writes"
    purpose: ClassVar[str] = (
        "Fuse rotary embedding, rotation and codes of new tokens, in decode with append, attention and its quantizer."
    )
    needs: ClassVar[Stage] = "fused"
    gives: ClassVar[Stage] = "fused"

    def run(self, program: Program) -> bool:
        """Returns whether anything was fused; adds to `program.measured[NEAR_MISSES]` what was not, and why."""
        changed, missed = False, list[NearMiss]()
        for graph in program.graphs.values():
            order = {node: place for place, node in enumerate(graph.nodes)}
            for attention in list(calls(graph, ATTENTION_KV)):
                if not any(is_call(node, KV_WRITE) for node in map(_write, attention.args[1:5])):
                    continue
                try:
                    _fuse(graph, attention, order)
                    changed = True
                except _MissError as reason:
                    missed.append(NearMiss(graph.name, attention.name, str(reason)))
            for attention in list(calls(graph, ATTENTION_KV)):
                changed |= fuse_step(graph, attention)
            tidy(graph)
        note_misses(program, missed)
        return changed


@dataclass
class _Found:
    """The operands of a fused write, and the values it replaces, in the order of its results."""

    operands: list[fx.Node] = field(default_factory=list[fx.Node])
    tables: tuple[fx.Node | None, fx.Node | None] = (None, None)
    rotate: bool = False
    bits: list[Any] = field(default_factory=list[Any])
    center: fx.Node | None = None
    past: list[fx.Node] = field(default_factory=list[fx.Node])
    replaced: list[fx.Node] = field(default_factory=list[fx.Node])


def _fuse(graph: Graph, attention: fx.Node, order: dict[fx.Node, int]) -> None:
    """Fuse the writes of one attention. Raises _MissError."""
    found = _find(attention)
    read = [node for node in (*found.operands, *found.tables, *found.past, found.center) if node is not None]
    last = max(read, key=order.__getitem__)
    for node in found.replaced:
        for user in node.users:
            if order[user] <= order[last]:
                raise _MissError(f"{user.name} reads {node.name} before {last.name} is computed")
    target = ROPE_KV_APPEND if found.past else ROPE_KV_WRITE
    before = last.next
    settings = found.rotate, *found.bits
    rest = [*found.past, *([] if found.center is None else [found.center])]
    new = call(graph, before, target, *found.operands, *found.tables, *settings, *rest, like=attention)
    for index, node in enumerate(found.replaced):
        part = call(graph, before, operator.getitem, new, index, like=attention)
        order[part] = order[last]
        node.replace_all_uses_with(part)


def _find(attention: fx.Node) -> _Found:
    """What is fused. Raises _MissError."""
    query: Any = attention.args[0]
    writes = _writes(attention)
    key, held = writes[0].args[0], writes[2].args[0]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(held, fx.Node)
    found = _Found(bits=[writes[0].args[1], writes[2].args[1]], replaced=[query])
    if is_call(key, aten.sub.Tensor) and _is_center(key.args[1]):
        found.center = key.args[1]  # type: ignore[assignment]
        key = _inside(key, alone=True)
    found.rotate = _rotated(query) and _rotated(key)
    if not found.rotate and (_rotated(query) or _rotated(key)):
        raise _MissError(f"only one of {query.name} and {key.name} is rotated")
    inner = [_inside(node) for node in (query, key)] if found.rotate else [query, key]
    ropes = [is_call(node, ROPE) for node in inner]
    if all(ropes) and inner[0].args[1:] == inner[1].args[1:]:
        found.tables = inner[0].args[1:]  # type: ignore[assignment]
        # A rotated query's embedding is read by the rotation; one that is not rotated is the query itself.
        inner = [_inside(node, alone=found.rotate or node is key) for node in inner]
    elif not found.rotate:
        raise _MissError(f"{query.name} and {key.name} are neither rotated nor embedded with the same tables")
    found.operands = [*inner, held]
    _check(found, key)
    found.past, parts = _appended(attention, writes)
    found.replaced += parts
    return found


def _writes(attention: fx.Node) -> list[fx.Node]:
    """The write that each part of the cache comes from."""
    writes = [_write(node) for node in attention.args[1:5]]
    for write, part in zip(writes, PARTS, strict=True):
        if not is_call(write, KV_WRITE):
            raise _MissError(f"the {part} are not written in front of {attention.name}")
    found = [write for write in writes if write is not None]
    if found[0] is not found[1] or found[2] is not found[3]:
        raise _MissError(f"codes and scales of {attention.name} are written apart")
    return found


def _write(part: Any) -> fx.Node | None:
    """The operator that wrote a part of the cache, before it is appended; None if it comes from elsewhere."""
    if is_call(part, aten.cat.default):
        part = part.args[0][-1]  # type: ignore[index]
    return part.args[0] if is_call(part, operator.getitem) else None  # type: ignore[return-value]


def _rotated(node: fx.Node) -> bool:
    return is_call(node, HADAMARD) and node.args[1] is None


def _is_center(node: Any) -> bool:
    """Whether an operand is a weight [1, H, 1, D]."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    shape = value(node).shape
    return len(shape) == 4 and shape[0] == shape[2] == 1


def _inside(node: fx.Node, alone: bool = False) -> fx.Node:
    """The first operand of an operator that is fused; of one that is read by others too if not `alone`."""
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    if alone and len(node.users) > 1:
        raise _MissError(f"{node.name} has another reader")
    return inner


def _check(found: _Found, key: fx.Node) -> None:
    """Refuse types and sizes that the operator has no form for, and keys with another reader."""
    if len(key.users) > 1:
        raise _MissError(f"{key.name} has another reader")
    query, _, held = (value(node) for node in found.operands)
    if any(value(node).dtype != query.dtype for node in found.operands) or query.dtype not in TYPES:
        raise _MissError(f"{', '.join(f'{node.name} is {value(node).dtype}' for node in found.operands)}")
    size = query.shape[3]
    if held.shape[3] != size or size % 2:
        raise _MissError(f"queries have {size} channels, values {held.shape[3]}: equal and even numbers are fused")
    for table in found.tables:
        if table is not None and (value(table).dim() != 4 or value(table).shape[1] != 1):
            raise _MissError(f"{table.name} is not a table [B, 1, S, D] for all heads")


def _appended(attention: fx.Node, writes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The cache that all parts are appended to, or nothing; and the values that the operator replaces."""
    parts: list[Any] = list(attention.args[1:5])
    joined = [is_call(part, aten.cat.default) for part in parts]
    new = [part.args[0][-1] if is_join else part for part, is_join in zip(parts, joined, strict=True)]
    written = {node for write in writes for node in write.users}
    if written - set(new):
        raise _MissError(f"{sorted(node.name for node in written - set(new))[0]} is a second reader of what is written")
    alone = all(len(node.users) == 1 for node in new) and all(
        is_join and len(part.args[0]) == 2 and part.args[1:] == (2,) and part.args[0][0].op == "placeholder"
        for part, is_join in zip(parts, joined, strict=True)
    )
    return ([part.args[0][0] for part in parts], parts) if alone else ([], new)
