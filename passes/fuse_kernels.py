"""Fuse norm, gate, transform and quantizer chains, and rotary embeddings, into single operators.

    rmsnorm [-> hadamard | * scale] -> quantize_int4        becomes  qpcompile::rmsnorm_quantize
    layer_norm [-> hadamard | * scale] -> quantize_int4     becomes  qpcompile::layernorm_quantize
    silu(gate) * up [-> hadamard | * scale] -> quantize_int4  becomes  qpcompile::silu_mul_quantize
    x * cos + cat(-x2, x1) * sin                            becomes  qpcompile::rope

The first three compute in one wider type and round once, to codes (kernels/sums.py): in float64 for float32 models,
whose separate norms and products may differ in the last bit; in float32 for half precision, where the intermediate
roundings to bfloat16 or float16 between norm, transform and quantizer disappear. Fused rotary embeddings are
bit-identical for float32 models; half precision rounds once. A value with another reader is not fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from qpcompile.ir.edit import aten, call, calls, is_call, operands, tidy
from qpcompile.ir.near_miss import NEAR_MISSES, NearMiss
from qpcompile.ir.operators import (
    HADAMARD,
    LAYERNORM_QUANTIZE,
    QUANTIZE_INT4,
    RMSNORM,
    RMSNORM_QUANTIZE,
    ROPE,
    SILU_MUL_QUANTIZE,
)
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.stages import Stage

FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FuseKernels:
    """See the module's docstring."""

    name: ClassVar[str] = "fuse_kernels"
    purpose: ClassVar[str] = (
        "Fuse norm, gate, transform and quantizer chains, and rotary embeddings, into single operators."
    )
    needs: ClassVar[Stage] = "quantized"
    gives: ClassVar[Stage] = "fused"

    def run(self, program: Program) -> bool:
        """Returns whether anything was fused; fills `program.measured[NEAR_MISSES]` with what was not, and why."""
        changed, missed = False, list[NearMiss]()
        for graph in program.graphs.values():
            for rewrite, operators in ((_fuse, (QUANTIZE_INT4,)), (_fuse_rope, (aten.add.Tensor,))):
                for node in list(calls(graph, *operators)):
                    reason = rewrite(graph, node)
                    changed |= reason is None
                    if reason:
                        missed.append(NearMiss(graph.name, node.name, reason))
            tidy(graph)
        program.measured[NEAR_MISSES] = tuple(missed)
        return changed


def _fuse(graph: Graph, quantize: fx.Node) -> str | None:
    """Fuse a quantizer with its input's producer. Returns None on success, else the reason, "" for no near miss."""
    x, group_size, clip_ratio = quantize.args
    assert isinstance(x, fx.Node)
    source, scale, rotate = _split_transform(x)
    producer = _producer(source)
    if isinstance(producer, str):
        return producer
    for read in (x, source):
        if len(read.users) > 1:
            return f"{read.name} has another reader"
    operator, inputs = producer
    new = call(graph, quantize, operator, *inputs, scale, rotate, group_size, clip_ratio, like=quantize)
    quantize.replace_all_uses_with(new)
    graph.module.graph.erase_node(quantize)
    return None


def _producer(source: fx.Node) -> tuple[OpOverload, Sequence[Any]] | str:
    """(fused operator that starts with this node, its leading operands), or the reason why there is none."""
    if is_call(source, RMSNORM):
        found = RMSNORM_QUANTIZE, source.args
    elif is_call(source, aten.layer_norm.default):
        norm = operands(source)
        if len(norm["normalized_shape"]) != 1:
            return f"{source.name} normalizes over more than the last axis"
        if norm["weight"] is None or norm["bias"] is None:
            return f"{source.name} has no weight or no bias"
        found = LAYERNORM_QUANTIZE, [norm[name] for name in ("input", "weight", "bias", "eps")]
    elif is_call(source, aten.mul.Tensor) and any(is_call(each, aten.silu.default) for each in source.args):
        gate, up = source.args
        if not is_call(gate, aten.silu.default) or len(gate.users) != 1:
            gate, up = up, gate
        if not is_call(gate, aten.silu.default) or len(gate.users) != 1:
            return "the silu has another reader"
        if not isinstance(up, fx.Node) or value(up).dtype != value(gate).dtype:
            return f"{source.name} multiplies by something other than a tensor of the same type"
        found = SILU_MUL_QUANTIZE, (gate.args[0], up)
    else:
        return ""
    if value(source).dtype not in FUSED_TYPES:
        return f"{source.name} is {value(source).dtype}"
    return found


def _split_transform(x: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """(transform input, scale, whether it is rotated) of a quantizer's input."""
    if is_call(x, HADAMARD):
        source, scale = x.args
        assert isinstance(source, fx.Node)
        return source, scale if isinstance(scale, fx.Node) else None, True
    if is_call(x, aten.mul.Tensor) and isinstance(x.args[1], fx.Node) and x.args[1].op == "get_attr":
        source = x.args[0]
        assert isinstance(source, fx.Node)
        return source, x.args[1], False
    return x, None, False


def _fuse_rope(graph: Graph, add: fx.Node) -> str | None:
    """Fuse an add that is a rotary embedding, including the casts around it if it computes in float32.

    Returns None on success, else the reason, "" for no near miss.
    """
    found = _rotated_halves(add)
    if isinstance(found, str):
        return found
    x, cos, sin = found
    last, source = add, x
    if is_call(x, aten.to.dtype) and len(add.users) == 1:
        before, after = x.args[0], next(iter(add.users))
        assert isinstance(before, fx.Node)
        if is_call(after, aten.to.dtype) and value(after).dtype == value(before).dtype:
            last, source = after, before
    if value(source).dtype not in FUSED_TYPES or value(last).dtype != value(source).dtype:
        return f"{source.name} is {value(source).dtype}, {last.name} {value(last).dtype}"
    new = call(graph, last, ROPE, source, cos, sin, like=last)
    last.replace_all_uses_with(new)
    return None


def _rotated_halves(add: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | str:
    """(x, cos, sin) if the node is x * cos + cat(-x2, x1) * sin, x = (x1, x2) along the last axis; else why not."""
    parts = [part for part in add.args if isinstance(part, fx.Node) and is_call(part, aten.mul.Tensor)]
    if len(parts) != 2 or add.kwargs:
        return ""
    (x, cos), (turned, sin) = (part.args for part in parts)
    if not (isinstance(x, fx.Node) and isinstance(cos, fx.Node) and isinstance(sin, fx.Node)):
        return ""
    if not isinstance(turned, fx.Node) or not is_call(turned, aten.cat.default):
        return ""
    joined, size = operands(turned), value(x).shape[-1]
    halves = joined["tensors"]
    if len(halves) != 2 or not is_call(halves[0], aten.neg.default):
        return f"{turned.name} is not (-x2, x1)"
    for part in (*parts, turned):
        if len(part.users) != 1:
            return f"{part.name} has another reader"
    if joined["dim"] not in (-1, value(x).dim() - 1) or not isinstance(size, int) or size % 2:
        return f"{turned.name} does not join two halves of the last axis"
    if not (_is_half(halves[0].args[0], x, size // 2, size) and _is_half(halves[1], x, 0, size // 2)):
        return f"{turned.name} does not join the halves of {x.name}"
    tables = [value(table) for table in (cos, sin)]
    if any(table.shape[-1] != size or table.dim() > value(x).dim() for table in tables):
        return f"{cos.name} and {sin.name} are not tables over the last axis of {x.name}"
    if tables[0].dtype != tables[1].dtype or not _same(value(add), value(x)):
        return f"{add.name} is not of the type and sizes of {x.name}"
    return x, cos, sin


def _is_half(node: Any, x: fx.Node, start: int, stop: int) -> bool:
    """Whether a node is x[..., start:stop]."""
    if not is_call(node, aten.slice.Tensor):
        return False
    part, size = operands(node), value(x).shape[-1]
    end = size if part["end"] is None else min(part["end"], size) if isinstance(part["end"], int) else -1
    return (
        part["input"] is x
        and part["dim"] in (-1, value(x).dim() - 1)
        and (part["start"] or 0, end, part["step"]) == (start, stop, 1)
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return [str(size) for size in one.shape] == [str(size) for size in other.shape]
