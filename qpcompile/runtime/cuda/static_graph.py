"""Rewrite a decode graph to static shapes: caches with a capacity of C tokens, filled slot by slot.

    %k = aten::cat([%past_key_values.0.key, %new], 2)      copies the cache, which grows by one token per step
      -> %k = write_token(%past_key_values.0.key, %new, %slot)             %slot: i64[1], the number of tokens before
    %q = aten::add(%zero, S)                               the length as a Python number
      -> %q = aten::add(%zero, %tokens)                                    %tokens: i64[], the same on the device
    %y = aten::scaled_dot_product_attention(%q, %k, %v, %mask)
      -> %y = ...(%q, %k, %v, %mask & %open)                               %open: bool[1, 1, 1, C], slots with a token
    %y = qpcompile::attention_kv(..., %mask, scale, 4, 4)
      -> %y = qpcompile::attention_kv(..., %mask, scale, 4, 4, %filled)   %filled: i64[1], how many those are

Layers between two token cuts share a length and therefore %slot, %open and %filled. In layers before every cut the slot
of a token is its position, as before. Any other use of token counts is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import fx

from qpcompile.errors import KernelError
from qpcompile.ir.edit import aten, calls, clone, is_call
from qpcompile.ir.names import CACHE, Name
from qpcompile.ir.operators import ATTENTION_KV, KV_READ
from qpcompile.ir.overloads import is_overload, schema
from qpcompile.ir.program import Graph
from qpcompile.ir.text import target_text
from qpcompile.ir.types import UNKNOWN, value_types
from qpcompile.runtime.growing_cache import appends, split_appends
from qpcompile.runtime.machine import ALIVE, KEPT, SEEN

# The group of layers before every cut; other groups are named by the layer of their cut.
FULL = "full"
# Additional inputs of a static graph; all except the first exist per group of layers.
TOKENS, SLOT, OPEN, FILLED = "tokens", "slot", "open", "filled"
MASK, SDPA = "attention_mask", aten.scaled_dot_product_attention.default

# What to do if steps cannot have static shapes.
GROWING = 'move the model with compiled.to("cuda", cuda_graphs=False): caches then grow with every token'
# Operators that process every slot independently, or sum over slots in which masked ones are 0.
BY_SLOT = frozenset(
    {
        *(aten.add, aten.sub, aten.mul, aten.le, aten.lt, aten.ge, aten.gt, aten.eq, aten.ne, aten.where),
        *(aten.bitwise_and, aten.bitwise_or, aten.bitwise_not, aten.logical_and, aten.logical_not, aten.__and__),
        *(aten.__or__, aten.logical_or, aten.masked_fill, aten.to, aten._to_copy, aten.clone, aten.contiguous),
        *(aten.unsqueeze, aten.squeeze, aten.expand, aten.view, aten.reshape, aten.transpose, aten.permute),
        *(aten.gather, aten.index, aten.arange, aten.ones, aten.zeros, aten.full, aten.new_ones, aten.new_zeros),
        *(aten.slice, aten.select, aten.sum, aten.sym_size, aten.ones_like, aten.zeros_like, aten.full_like),
        *(aten.new_full, aten.repeat_interleave, aten.alias),
        KV_READ.overloadpacket,
    }
)


@dataclass(frozen=True)
class StaticGraph:
    """A module that takes `inputs` and returns `outputs`; the caches among its inputs are updated in place.

    groups: `FULL` and the cuts, as text. group_of: the group of each cache. mask_axes: the inputs, other than caches,
    that have one entry per slot of `FULL`, and the axis of it.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    groups: tuple[str, ...]
    group_of: dict[str, str]
    mask_axes: dict[str, int]


def write_token(past: torch.Tensor, new: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Write new: [B, H, 1, D] to slot: i64[1] of past: [B, H, C, D]; returns `past`."""
    return past.index_copy_(2, slot, new)


def static_graph(graph: Graph) -> StaticGraph:
    """The rewritten decode graph; the original is unchanged. Raises KernelError if it cannot be made static."""
    graph = clone(graph)
    split_appends(graph)
    lengths = _Lengths(graph)
    outside: dict[str, int] = {
        path: axis
        for path in graph.inputs
        if path.root not in (CACHE, KEPT, ALIVE, SEEN)
        for axis in lengths.axes(graph.placeholder(path))
    }
    for path in outside:
        if Name(path).root != MASK:
            raise _refusal(f"the input {path} has an entry per token", graph.placeholder(path))
    last = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    added: dict[str, fx.Node] = {}
    for name in (TOKENS, *(f"{kind}.{group}" for group in lengths.groups for kind in (SLOT, OPEN, FILLED))):
        with graph.module.graph.inserting_after(last):
            added[name] = last = graph.module.graph.placeholder(name.replace(".", "_"))
    written = _write_in_place(graph, lengths, added)
    _check(graph, lengths, written)
    _lengths_from_device(graph, lengths, added)
    _close_attention(graph, lengths, added)
    outputs = _drop_caches(graph)
    graph.module.recompile()
    groups: dict[str, str] = {path: lengths.group(graph.placeholder(path), 0) for path in graph.inputs if path.in_cache}
    return StaticGraph(graph.module, (*graph.inputs, *added), outputs, lengths.groups, groups, outside)


class _Lengths:
    """Which sizes of a decode graph count tokens, with or without the new one, and in which group of layers."""

    def __init__(self, graph: Graph) -> None:
        self.types = value_types(graph)
        caches = [graph.placeholder(path) for path in graph.inputs if path.in_cache]
        cached = (graph.placeholder(SEEN), 0) if SEEN in graph.inputs else (caches[0], 2)
        self.past = self.sizes(cached[0])[cached[1]]
        self.totals = {FULL: self.past + 1}
        for path in graph.inputs:
            if path.root == KEPT:
                self.totals[path.rest] = self.sizes(graph.placeholder(path))[1]
        self.groups = tuple(self.totals)
        self.symbols = set[sympy.Basic]().union(*(each.free_symbols for each in self.totals.values()))

    def sizes(self, node: Any) -> list[sympy.Expr]:
        """The sizes of a node's tensors, concatenated; none for a number or a non-node."""
        tensors = self.types.get(node, UNKNOWN).tensors
        return [size.expression for tensor in tensors for size in tensor.sizes]

    def number(self, node: fx.Node) -> sympy.Expr | None:
        """The token count that a scalar node represents, if it is one."""
        kind = self.types.get(node, UNKNOWN)
        value = kind.number.expression if kind.scalar is int and kind.number is not None else None
        return value if value is not None and self.counts(value) else None

    def counts(self, size: sympy.Expr) -> bool:
        """Whether a size is a token count, or computed from one."""
        return bool(size.free_symbols & self.symbols)

    def axes(self, node: fx.Node) -> Iterator[int]:
        """The axes of a tensor that count tokens, of `FULL` with the new one; other counts are refused."""
        for axis, size in enumerate(self.sizes(node)):
            if self.counts(size):
                if size != self.totals[FULL]:
                    raise _refusal(f"axis {axis} is a number of tokens that is not all of them", node)
                yield axis

    def group(self, node: Any, new: int) -> str:
        """The group of layers that keys or values [B, H, tokens, D] belong to, with or without the new token."""
        size = self.sizes(node)[2] + 1 - new
        for name, total in self.totals.items():
            if total == size:
                return name
        raise _refusal("its length is that of no group of layers", node)


def _write_in_place(graph: Graph, lengths: _Lengths, added: dict[str, fx.Node]) -> set[fx.Node]:
    """Replace appends to caches by in-place writes; returns the writing nodes."""
    found = appends(graph)
    written = {node.args[0][0] for node in found}  # type: ignore[index]
    for path in graph.inputs:
        if path.in_cache and graph.placeholder(path) not in written:
            raise _refusal(f"nothing appends one token to {path}", graph.placeholder(path))
    for node in found:
        past, new = node.args[0]  # type: ignore[misc]
        if lengths.sizes(new)[2] != 1:
            raise _refusal("it appends more than one token", node)
        node.args = (past, new, added[f"{SLOT}.{lengths.group(past, 0)}"])  # type: ignore[arg-type]
        node.target, node.kwargs = write_token, {}
    return set(found)


def _check(graph: Graph, lengths: _Lengths, written: set[fx.Node]) -> None:
    """Refuse operators that do not treat all slots alike."""
    totals = set(lengths.totals.values())
    for node in graph.nodes:
        if node.op != "call_function" or node in written or not is_overload(node.target):
            continue
        tensors = (node, *node.all_input_nodes)
        if (
            node.target not in (SDPA, ATTENTION_KV)
            and node.target.overloadpacket not in BY_SLOT
            and any(lengths.counts(size) for each in tensors for size in lengths.sizes(each))
        ):
            raise _refusal("it has no rule for slots that hold no token yet", node)
        for size in filter(lengths.counts, lengths.sizes(node)):
            if size not in totals:
                raise _refusal("one of its sizes is a number of tokens that is not all of them", node)
        if node.target.overloadpacket in (aten.slice, aten.select):
            before, after = (sum(map(lengths.counts, lengths.sizes(each))) for each in (node.args[0], node))
            if before != after:
                raise _refusal("it takes tokens by their place", node)


def _lengths_from_device(graph: Graph, lengths: _Lengths, added: dict[str, fx.Node]) -> None:
    """Read token counts that take part in arithmetic, not only in sizes, from the device."""
    caches = {graph.placeholder(path) for path in graph.inputs if path.in_cache}
    for node in graph.nodes:
        number = lengths.number(node)
        if number is None:
            continue
        if is_call(node, aten.sym_size.int) and node.args[0] in caches and node.args[1] in (2, -2):
            # The capacity includes the new token already.
            with graph.module.graph.inserting_after(node):
                before = graph.module.graph.call_function(operator.sub, (node, 1))
            node.replace_all_uses_with(before, lambda user, ours=before: user is not ours)
            node = before
        for user in list(node.users):
            places = list(_as_number(user, node))
            if places:
                with graph.module.graph.inserting_before(user):
                    tensor = _on_device(graph, number - lengths.past, added[TOKENS], user)
                for place in places:
                    user.update_arg(place, tensor)


def _as_number(user: fx.Node, node: fx.Node) -> Iterator[int]:
    """The arguments of `user` where `node` takes part in arithmetic; where it is a size there is nothing to do."""
    if not is_overload(user.target):
        return
    for place, (argument, given) in enumerate(zip(schema(user.target).arguments, user.args, strict=False)):
        if given is not node:
            continue
        kind = str(argument.type)
        if kind == "Tensor":
            yield place
        elif kind == "number" and not is_call(user, aten.arange.default):
            raise _refusal("it takes the number of tokens as a number in Python", user)


def _on_device(graph: Graph, more: sympy.Expr, tokens: fx.Node, user: fx.Node) -> fx.Node:
    """The node for the number of tokens plus `more`, as a tensor: i64[]."""
    if not more.is_Integer:
        raise _refusal("it counts with a number that is not the number of tokens and some", user)
    return graph.module.graph.call_function(aten.add.Tensor, (tokens, int(more))) if more != 0 else tokens


def _close_attention(graph: Graph, lengths: _Lengths, added: dict[str, fx.Node]) -> None:
    """Mask slots without a token in every attention."""
    closed: dict[tuple[Any, str], fx.Node] = {}
    for node in list(calls(graph, ATTENTION_KV)):
        group = lengths.group(node.args[1], 1)
        node.args = (*node.args, added[f"{FILLED}.{group}"])
    for node in list(calls(graph, SDPA)):
        names = [argument.name for argument in schema(SDPA).arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("is_causal"):
            raise _refusal("it makes a mask from sizes", node)
        group, mask = lengths.group(given["key"], 1), given.get("attn_mask")
        if (mask, group) not in closed:
            with graph.module.graph.inserting_before(node):
                closed[mask, group] = _closed(graph, lengths, mask, added[f"{OPEN}.{group}"])
        given["attn_mask"] = closed[mask, group]
        node.args, node.kwargs = (), given


def _closed(graph: Graph, lengths: _Lengths, mask: fx.Node | None, is_open: fx.Node) -> fx.Node:
    """The mask combined with `is_open`."""
    if mask is None:
        return is_open
    dtype = lengths.types[mask].dtype
    assert dtype is not None
    if dtype == torch.bool:
        return graph.module.graph.call_function(aten.bitwise_and.Tensor, (mask, is_open))
    least = torch.finfo(dtype).min
    return graph.module.graph.call_function(aten.where.ScalarOther, (is_open, mask, least))


def _drop_caches(graph: Graph) -> tuple[str, ...]:
    """Drop the caches, which are updated in place, from the outputs; returns the remaining ones."""
    (results,) = graph.output_node.args
    assert isinstance(results, tuple)
    kept = [(path, node) for path, node in zip(graph.outputs, results, strict=True) if not path.in_cache]
    graph.output_node.args = (tuple(node for _, node in kept),)
    return tuple(path for path, _ in kept)


def _refusal(why: str, node: fx.Node) -> KernelError:
    where = target_text(node.target) if node.op == "call_function" else node.name
    return KernelError(
        f"this decode graph cannot run with static shapes: {why}",
        where=f"decode, {node.name}: {where}",
        do=GROWING,
    )
