"""Attention, caches and rotary embeddings in fast graphs (graphs.py): one fused operator each.

prefill  attention_kv(%q, kv_write(%k), ...)     ->  causal_attention(%q, %k, ...), the cache: channel_codes(%k)
decode   cat(%past, kv_write(%k)), attention_kv  ->  %y, %key, %value = cached_attention(%q, %k, %v, ...)
both     rope(%x, %cos, %sin)                      ->  doubled_rope, if both halves of a head use the same angles
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qpcompile.emit.onnx.edit import calls, put, replace
from qpcompile.emit.onnx.runner.runner import SEEN
from qpcompile.emit.onnx.wrap import Part
from qpcompile.errors import ExportError
from qpcompile.ir.attention import read_attention
from qpcompile.ir.edit import aten, is_call, operands, through_shape_ops
from qpcompile.ir.names import CACHE
from qpcompile.ir.operators import ATTENTION_KV, HADAMARD, KV_READ, KV_WRITE, ROPE
from qpcompile.ir.shapes import identifier, value

Tensor = torch.Tensor

# Headroom: a new token may be this much larger than the prompt's maximum before its code is clipped.
HEADROOM = 1.5
# onnxruntime's attention requires a head width that is a multiple of this.
WIDTHS = 8
# Operators that are elementwise on the last axis, or move other axes.
_ALIKE = (aten.to.dtype, aten.cos.default, aten.sin.default, aten.mul.Tensor, aten.unsqueeze.default)


def rotary_in_one(part: Part) -> None:
    """Replace rotary embeddings with equal angles in both halves, as in most models, by onnxruntime's operator."""
    for node in calls(part, ROPE):
        x, cos, sin = node.args
        assert isinstance(x, fx.Node) and isinstance(cos, fx.Node) and isinstance(sin, fx.Node)
        tokens = list(value(x).shape)
        # Heads are the axis after the batch, or after the tokens of a picture.
        tokens[1] = 1
        if len(tokens) not in (3, 4) or any(list(value(each).shape) != tokens for each in (cos, sin)):
            continue
        if _is_doubled(cos) and _is_doubled(sin):
            new = put(part, node, doubled_rope, x, cos, sin, like=node)
            new.meta["val"] = value(node)
            node.replace_all_uses_with(new)


def _is_doubled(node: fx.Node) -> bool:
    """Whether a node's last axis is one half repeated: cat([y, y], -1) followed by elementwise operators."""
    while is_call(node, *_ALIKE) and isinstance(node.args[0], fx.Node):
        if any(isinstance(other, fx.Node) for other in node.args[1:]):
            return False
        node = node.args[0]
    if not is_call(node, aten.cat.default):
        return False
    joined = operands(node)
    parts = joined["tensors"]
    return len(parts) == 2 and parts[0] is parts[1] and joined["dim"] in (-1, value(node).dim() - 1)


def doubled_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: f[B, H, S, D], cos, sin: f[B, 1, S, D] whose halves are equal -> f[B, H, S, D]; or without S."""
    return ROPE(x, cos, sin)


def _written(node: object) -> fx.Node | None:
    """The keys or values whose codes or scales a node holds, without the centre that changes no attention."""
    if not is_call(node, operator.getitem) or not is_call(node.args[0], KV_WRITE):
        return None
    held = node.args[0].args[0]
    assert isinstance(held, fx.Node)
    if is_call(held, aten.sub.Tensor) and isinstance(held.args[1], fx.Node) and held.args[1].op == "get_attr":
        return held.args[0]  # type: ignore[return-value]
    return held


def _unrotated(node: Any) -> fx.Node:
    """The input of a rotation for the cache, which cancels in the product of rotated queries and keys."""
    assert isinstance(node, fx.Node)
    if is_call(node, HADAMARD) and node.args[1] is None:
        return node.args[0]  # type: ignore[return-value]
    return node


def float_keys(part: Part, small_cache: bool) -> Part:
    """Prefill (and the tower, which has no cache): attend to unquantized keys and values, quantize only the cache."""
    for node in calls(part, KV_READ):
        if (held := _written(node.args[0])) is not None:
            node.replace_all_uses_with(held)
    for node in calls(part, ATTENTION_KV, aten.scaled_dot_product_attention.default):
        if is_call(node, ATTENTION_KV):
            query, key, _, held, _, mask, scale, *_ = node.args
            keys, values = _written(key), _written(held)
            if keys is None or values is None:
                raise _cache_error(node)
        else:
            read = read_attention(node)
            query, keys, values, mask, scale = read.query, read.key, read.value, read.mask, read.scale
            if read.causal:
                continue
        if is_call(query, HADAMARD) and is_call(keys, HADAMARD):
            query, keys = _unrotated(query), _unrotated(keys)
        made = causal_attention if _sees_no_later(mask) else open_attention
        replace(part, node, put(part, node, made, query, keys, values, mask, scale, like=node))
    return _prompt_cache(part, small_cache)


def _sees_no_later(mask: Any) -> bool:
    """Whether the mask is causal on the example, which contains a picture."""
    flags = mask.meta.get("val") if isinstance(mask, fx.Node) else None
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.shape[-1] != flags.shape[-2]:
        return False
    return not bool(flags.triu(1).any())


def open_attention(query: Tensor, key: Tensor, held: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query: f[B, Hq, S, D], key, held: f[B, Hkv, T, D], mask: [B | 1, 1 | Hq, S, T] -> f[B, Hq, S, D]."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(query, key, held, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def causal_attention(query: Tensor, key: Tensor, held: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same, with a causal mask."""
    return open_attention(query, key, held, mask, scale)


def _prompt_cache(part: Part, small_cache: bool) -> Part:
    """Rewrite the outputs of prefill: `present.l.key`, and with an 8-bit cache `present.l.key.scale`."""
    output = next(reversed(part.module.graph.nodes))
    results: dict[str, Any] = {}
    for path, node in zip(part.outputs, output.args[0], strict=True):  # type: ignore[arg-type]
        base, _, kind = path.rpartition(".")
        if kind == "affine":
            continue
        if kind == "codes":
            path, node = base, _stored(part, node)
        results[path] = node
        if small_cache and path.startswith("present.") and path.split(".")[1] not in ("kept", "alive"):
            pair = put(part, output, channel_codes, node, like=node)
            results[path] = put(part, output, operator.getitem, pair, 0, like=node)
            results[f"{path}.scale"] = put(part, output, operator.getitem, pair, 1, like=node)
    output.args = (tuple(results.values()),)
    return Part(part.module, part.inputs, tuple(results))


def _stored(part: Part, node: fx.Node) -> fx.Node:
    """Keys or values instead of their codes, gathered like the codes where tokens are dropped."""
    if not is_call(node, aten.gather.default):
        held = _written(node)
        if held is None:
            raise _cache_error(node)
        return _unrotated(held)
    codes, axis, index = node.args
    held = _written(codes)
    if held is None or not is_call(index, aten.expand.default):
        raise _cache_error(node)
    held = _unrotated(held)
    narrow, sizes = index.args
    wide = put(part, node, aten.expand.default, narrow, [*sizes[:-1], int(value(held).shape[-1])], like=node)  # type: ignore[index]
    return put(part, node, aten.gather.default, held, axis, wide, like=node)


def channel_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: i8[B, H, S, D], scale: f32[H, 1, D], one per channel of a head, shared by all rows."""
    scale = x.float().abs().amax((0, 2))[:, None] * (HEADROOM / 127)
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.clamp(torch.round(x.float() / scale), -128, 127).to(torch.int8), scale


def cached_attention(
    query: Tensor,
    key: Tensor,
    held: Tensor,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """query: f[B, Hq, 1, D], key, held: f[B, Hkv, 1, D], mask: [B | 1, 1, 1, S + 1].

    caches: of keys and of values, [B, Hkv, room, D]; scales: f[Hkv, 1, D] of each where they hold 8-bit codes.

    Writes the new token to slot S of both caches. Returns attention over S + 1 slots, and the caches. This function
    only provides shapes; its translation is GroupQueryAttention.
    """
    return torch.empty_like(query), *caches


def append_in_place(part: Part, small_cache: bool) -> Part:
    """Decode: one operator appends to the cache and attends to it; caches are inputs and outputs of any capacity."""
    rewriter = _InPlace(part, small_cache)
    for node in calls(part, ATTENTION_KV, aten.scaled_dot_product_attention.default):
        rewriter.attention(node)
    return rewriter.finish()


class _InPlace:
    def __init__(self, part: Part, small_cache: bool) -> None:
        self.part = part
        self.small_cache = small_cache
        self.placeholders = [node for node in part.module.graph.nodes if node.op == "placeholder"]
        self.before = dict(zip(part.inputs, self.placeholders, strict=True))
        self.paths = {node: path for path, node in self.before.items()}
        self.caches: dict[str, fx.Node] = {}
        self.written: dict[str, fx.Node] = {}

    def attention(self, node: fx.Node) -> None:
        """Rewrite one attention if it reads the cache."""
        if is_call(node, ATTENTION_KV):
            query, keys, _, values, _, mask, scale, *_ = node.args
        else:
            read = read_attention(node)
            query, keys, values, mask, scale = read.query, read.key, read.value, read.mask, read.scale
        key_path, key = self._appended(keys, node)
        # Prefill caches keys without the Hadamard rotation.
        if is_call(query, HADAMARD) != is_call(key, HADAMARD):
            raise _cache_error(node)
        query, key = _unrotated(query), _unrotated(key)
        value_path, held = self._appended(values, node)
        if not isinstance(mask, fx.Node) or not _fits(query, key, held):
            raise _cache_error(node)
        caches = tuple(self._cache(path, new) for path, new in ((key_path, key), (value_path, held)))
        scales = tuple(self._scale(path) for path in (key_path, value_path)) if self.small_cache else None
        done = put(self.part, node, cached_attention, query, key, held, caches, scales, mask, scale, like=node)
        y, *present = (put(self.part, node, operator.getitem, done, index, like=node) for index in range(3))
        self.written |= dict(zip((key_path, value_path), present, strict=True))
        replace(self.part, node, y)

    def _appended(self, node: Any, attention: fx.Node) -> tuple[str, fx.Node]:
        """The path of the cached tensor that attention reads, and the tensor that this step appends."""
        joined = through_shape_ops(node)
        parts = joined.args[0] if is_call(joined, aten.cat.default) else ()
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or parts[0] not in self.paths:
            raise _cache_error(attention)
        past, new = parts
        written = _written(new)
        assert isinstance(past, fx.Node) and isinstance(new, fx.Node)
        return self.paths[past].removesuffix(".codes"), new if written is None else written

    def _cache(self, path: str, new: fx.Node) -> fx.Node:
        tensor = value(new)
        dtype = torch.int8 if self.small_cache else tensor.dtype
        return self._input(path, torch.empty(1, tensor.shape[1], 1, tensor.shape[3], dtype=dtype, device="meta"))

    def _scale(self, path: str) -> fx.Node:
        return self._input(f"{path}.scale", torch.empty(1, 1, 1, device="meta"))

    def _input(self, path: str, example: Tensor) -> fx.Node:
        with self.part.module.graph.inserting_after(self.placeholders[-1]):
            node = self.part.module.graph.placeholder(f"{identifier(path)}_in_place")
        node.meta["val"] = example
        self.placeholders.append(node)
        self.caches[path] = node
        return node

    def finish(self) -> Part:
        """The part with the new inputs and outputs. Raises ExportError if a cache is still copied."""
        graph = self.part.module.graph
        self._read_lengths_elsewhere()
        output = next(reversed(graph.nodes))
        results: dict[str, Any] = {}
        for path, node in zip(self.part.outputs, output.args[0], strict=True):  # type: ignore[arg-type]
            base = path.removesuffix(".codes").removesuffix(".affine").replace("present", CACHE, 1)
            cached = base in self.written
            results[f"present.{base.removeprefix(f'{CACHE}.')}" if cached else path] = (
                self.written[base] if cached else node
            )
        output.args = (tuple(results.values()),)
        graph.eliminate_dead_code()
        inputs = {path: node for path, node in self.before.items() if not path.startswith(f"{CACHE}.")} | self.caches
        left = [path for path, node in self.before.items() if path.startswith(f"{CACHE}.") and node.users]
        if left:
            raise _cache_error(self.before[left[0]])
        order = {node: path for path, node in inputs.items()}
        for node in self.before.values():
            if node not in order:
                graph.erase_node(node)
        inputs_in_order = [order[node] for node in graph.nodes if node.op == "placeholder"]
        return Part(self.part.module, tuple(inputs_in_order), tuple(results))

    def _read_lengths_elsewhere(self) -> None:
        """Read token counts from `tokens_seen`: a cache's size is its capacity, not its number of tokens."""
        for node in calls(self.part, aten.sym_size.int):
            path = self.paths.get(node.args[0], "")  # type: ignore[arg-type]
            if not path.startswith(f"{CACHE}."):
                continue
            base = path.removesuffix(".codes").removesuffix(".affine")
            if node.args[1] != 2:
                node.args = (self.caches[base], node.args[1])
                continue
            if SEEN not in self.before:
                example = torch.empty(1, dtype=torch.int64, device="meta")
                self.before[SEEN] = self._input(SEEN, example)
                del self.caches[SEEN]
            node.args = (self.before[SEEN], 0)


def _fits(query: Any, key: fx.Node, held: fx.Node) -> bool:
    """Whether onnxruntime's cached attention supports these heads, f[B, H, 1, D]."""
    width, others = value(query).shape[-1], [value(each).shape[-1] for each in (key, held)]
    return width % WIDTHS == 0 and others == [width, width]


def _cache_error(node: fx.Node) -> ExportError:
    return ExportError(
        "onnxruntime's attention with an in-place cache does not support this layer: it needs a mask, heads of "
        f"one width that {WIDTHS} divides, and keys and values appended to those that are cached",
        where=f"export_onnx(fast=True), {node.name}",
        do="leave out fast=True: the exact graphs have none of these limits",
    )
