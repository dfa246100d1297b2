"""Store the KV cache in 4 or 8 bits, in prefill and decode: quantized after the rotary embedding, before attention.

    prefill  %k = quant_stub(%rope)                      -> %c, %a = qpcompile::kv_write(%rope, 4)
             sdpa(%q, repeat(%k), repeat(%v), %mask)     -> qpcompile::attention_kv(%q, %c, %a, ..., 4, 4)
    decode   cat(%past, quant_stub(%rope))               -> cat(%past.codes, %c), cat(%past.affine, %a)

Keys and values may have bits of their own. Scales are per token and head, so dropping tokens never changes the codes of
kept tokens.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.ir.attention import appended, read_attention
from qpcompile.ir.edit import aten, call, calls, count_up, is_call, layer_of, through_shape_ops, tidy
from qpcompile.ir.names import Name, names
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import (
    ATTENTION_KV,
    KV_READ,
    KV_WRITE,
    QUANT_STUB,
    SIMULATE_KIVI,
)
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.ir.shapes import fake_mode, value
from qpcompile.recipe.plan import Site
from qpcompile.recipe.quantize import CacheScheme
from qpcompile.stages import Stage

Pair = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class QuantizeKvCache:
    """See the module's docstring."""

    name: ClassVar[str] = "quantize_kv_cache"
    purpose: ClassVar[str] = (
        "Store the KV cache in 4 or 8 bits, in prefill and decode: quantized after the rotary embedding, before "
        "attention."
    )
    needs: ClassVar[Stage] = "cut"
    gives: ClassVar[Stage] = "quantized"

    def run(self, program: Program) -> bool:
        """Returns whether the recipe quantizes the cache."""
        scheme = program.recipe.quantize
        if scheme is None or scheme.kv_cache.bits == 16:
            return False
        if scheme.kv_cache.granularity == "kivi":
            return _simulate_kivi(program, scheme.kv_cache.bits)
        sites = []
        for graph in program.language:
            pairs = {stub: _write(graph, stub, scheme.kv_cache) for stub in _stubs(graph)}
            _replace_attention(graph, pairs)
            for stub in pairs:
                _dequantize(graph, stub, pairs)
            _replace_cache(graph, pairs)
            tidy(graph)
            layers = sorted({layer for stub in pairs if (layer := layer_of(stub)) is not None})
            sites += [
                Site(
                    graph=graph.name,
                    name=f"{graph.owner}.layers.{layer}.{part}",
                    cache_bits=bits,
                    kernel="qpcompile::attention_kv",
                )
                for layer in layers
                for part, bits in _parts(scheme.kv_cache).items()
            ]
        program.plan = program.plan.changed(sites=(*program.plan.sites, *sites))
        return bool(sites)


def _parts(cache: CacheScheme) -> dict[str, int]:
    """The sites of a layer's cache and their bits: one, or one each for keys and values of other bits."""
    keys, values = cache.bits_of("key"), cache.bits_of("value")
    return {"kv_cache": keys} if keys == values else {"kv_cache.key": keys, "kv_cache.value": values}


def _simulate_kivi(program: Program, bits: int) -> bool:
    """Round the cache that prefill returns, in floating point; attention in prefill and new tokens stay exact."""
    sites = []
    for graph in program.language:
        stubs = _stubs(graph)
        if stubs and graph.name == PREFILL:
            sites = [_simulated(graph, path, bits) for path in graph.outputs if path.in_cache]
        for stub in stubs:
            stub.replace_all_uses_with(stub.args[0])  # type: ignore[arg-type]
            graph.module.graph.erase_node(stub)
        tidy(graph)
    program.plan = program.plan.changed(sites=(*program.plan.sites, *sites))
    return bool(sites)


def _simulated(graph: Graph, path: Name, bits: int) -> Site:
    (values,) = graph.output_node.args
    assert isinstance(values, tuple)
    results, position = list(values), graph.outputs.index(path)
    key = path.part == "key"
    results[position] = call(graph, graph.output_node, SIMULATE_KIVI, results[position], 2**bits - 1, key)
    graph.output_node.args = (tuple(results),)
    kernel = "simulation: KIVI in floating point, qpcompile::simulate_kivi"
    return Site(graph=graph.name, name=f"{graph.owner}.layers.{path.layer}.{path.part}", cache_bits=bits, kernel=kernel)


def _stubs(graph: Graph) -> list[fx.Node]:
    found = []
    for stub in calls(graph, QUANT_STUB):
        fact = stub_fact(stub)
        if fact is not None and fact.role in ("key", "value"):
            found.append(stub)
    return found


def _write(graph: Graph, stub: fx.Node, cache: CacheScheme) -> Pair:
    fact = stub_fact(stub)
    assert fact is not None
    pair = call(graph, stub, KV_WRITE, stub.args[0], cache.bits_of(fact.role))
    return call(graph, stub, operator.getitem, pair, 0), call(graph, stub, operator.getitem, pair, 1)


def _bits(pair: Pair) -> Any:
    """Bits of the codes that `_write` made."""
    write = pair[0].args[0]
    assert isinstance(write, fx.Node)
    return write.args[1]


def _source(node: fx.Node) -> fx.Node:
    """The stub that an attention's key or value comes from, through repeats and the append to the past."""
    return through_shape_ops(node, extra=(aten.cat.default,))


def _cached(graph: Graph, node: fx.Node, pairs: dict[fx.Node, Pair], before: fx.Node) -> Pair:
    """Codes and scales of all tokens that the attention sees: the past's, if there is one, then the new tokens'."""
    stub = _source(node)
    codes, affine = pairs[stub]
    append = next((user for user in stub.users if appended(user) is stub), None)
    if append is None:
        return codes, affine
    parts = append.args[0]
    assert isinstance(parts, (list, tuple))
    past = parts[0]
    assert isinstance(past, fx.Node)
    joined = []
    for kind, new in (("codes", codes), ("affine", affine)):
        old = _past(graph, past, kind, new)
        joined.append(call(graph, before, aten.cat.default, [old, new], 2))
    return joined[0], joined[1]


def _past(graph: Graph, past: fx.Node, kind: str, new: fx.Node) -> fx.Node:
    """The placeholder of a cached tensor's codes or scales; created next to the one it replaces."""
    position = [node for node in graph.nodes if node.op == "placeholder"].index(past)
    path = f"{graph.inputs[position]}.{kind}"
    if path in graph.inputs:
        return graph.placeholder(path)
    with graph.module.graph.inserting_before(past):
        node = graph.module.graph.placeholder(path.replace(".", "_"))
    shape = [*value(past).shape[:3], value(new).shape[3]]
    with fake_mode(graph):
        node.meta["val"] = torch.empty(shape, dtype=value(new).dtype, device=value(new).device)
    graph.inputs = names((*graph.inputs[:position], path, *graph.inputs[position:]))
    return node


def _replace_attention(graph: Graph, pairs: dict[fx.Node, Pair]) -> None:
    for attention in list(calls(graph, aten.scaled_dot_product_attention.default)):
        read = read_attention(attention)
        if _source(read.key) not in pairs or _source(read.value) not in pairs:
            continue
        mask = _causal_mask(graph, attention) if read.mask is None and read.causal else read.mask
        keys = _cached(graph, read.key, pairs, attention)
        values = _cached(graph, read.value, pairs, attention)
        bits = [_bits(pairs[_source(node)]) for node in (read.key, read.value)]
        new = call(graph, attention, ATTENTION_KV, read.query, *keys, *values, mask, read.scale, *bits)
        attention.replace_all_uses_with(new)
        graph.module.graph.erase_node(attention)


def _causal_mask(graph: Graph, attention: fx.Node) -> fx.Node:
    """bool[S, S], true on and below the diagonal, for attention that was traced with `is_causal`."""
    size = call(graph, attention, aten.sym_size.int, attention.args[0], 2)
    position = count_up(graph, attention, size, value(attention).device)
    rows = call(graph, attention, aten.unsqueeze.default, position, 1)
    flat = call(graph, attention, aten.le.Tensor, position, rows)
    return call(graph, attention, aten.unsqueeze.default, call(graph, attention, aten.unsqueeze.default, flat, 0), 0)


def _replace_cache(graph: Graph, pairs: dict[fx.Node, Pair]) -> None:
    """Outputs `past_key_values.l.key` become `.codes` and `.affine`; gathers after a cut are applied to both."""
    (values,) = graph.output_node.args
    assert isinstance(values, tuple)
    results, paths = [], []
    for path, node in zip(graph.outputs, values, strict=True):
        assert isinstance(node, fx.Node)
        stub = _source_stub(node) if path.in_cache else None
        if stub is None or stub not in pairs:
            results.append(node)
            paths.append(path)
            continue
        for kind, new in zip(("codes", "affine"), _stored(graph, node, stub, pairs), strict=True):
            results.append(new)
            paths.append(f"{path}.{kind}")
    graph.output_node.args = (tuple(results),)
    graph.outputs = names(paths)
    graph.module.graph.eliminate_dead_code()
    for path in [path for path in graph.inputs if path.in_full_precision]:
        placeholder = graph.placeholder(path)
        for user in list(placeholder.users):
            # The codes have the same batch size and length.
            if is_call(user, aten.sym_size.int) and f"{path}.codes" in graph.inputs and user.args[1] != 3:
                user.replace_input_with(placeholder, graph.placeholder(f"{path}.codes"))
        if not placeholder.users:
            graph.module.graph.erase_node(placeholder)
            graph.inputs = tuple(name for name in graph.inputs if name != path)


def _source_stub(node: fx.Node) -> fx.Node | None:
    source = through_shape_ops(node, extra=(aten.gather.default, aten.cat.default))
    return source if is_call(source, QUANT_STUB) else None


def _stored(graph: Graph, node: fx.Node, stub: fx.Node, pairs: dict[fx.Node, Pair]) -> Pair:
    if is_call(node, aten.gather.default):
        return _gathered(graph, node, pairs[stub])
    return _cached(graph, stub, pairs, graph.output_node)


def _gathered(graph: Graph, gather: fx.Node, pair: Pair) -> Pair:
    """The gather of a compacted cache, on codes and scales: its index is expanded along their last axis."""
    _, axis, index = gather.args
    assert isinstance(index, fx.Node) and is_call(index, aten.expand.default)
    narrow, sizes = index.args
    assert isinstance(sizes, (list, tuple))
    parts = []
    for tensor in pair:
        wide = call(graph, gather, aten.expand.default, narrow, [*sizes[:-1], int(value(tensor).shape[-1])])
        parts.append(call(graph, gather, aten.gather.default, tensor, axis, wide))
    return parts[0], parts[1]


def _dequantize(graph: Graph, stub: fx.Node, pairs: dict[fx.Node, Pair]) -> None:
    """Other readers (token scores, attention in another form) see what attention sees: quantized and dequantized."""
    appends = [user for user in stub.users if appended(user) is stub]
    for source in (stub, *appends):
        readers = [user for user in source.users if user not in appends and not _is_stored(user)]
        if readers:
            first = min(readers, key=graph.nodes.index)
            codes = _cached(graph, stub, pairs, first) if source in appends else pairs[stub]
            tensor = value(source)
            read = call(graph, first, KV_READ, *codes, int(tensor.shape[-1]), _bits(pairs[stub]), tensor.dtype)
            for reader in readers:
                reader.replace_input_with(source, read)


def _is_stored(node: fx.Node) -> bool:
    """Whether a value only becomes the cache, as it is or compacted; the codes take its place there."""
    return node.op == "output" or (is_call(node, aten.gather.default) and all(map(_is_stored, node.users)))
