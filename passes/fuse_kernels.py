"""Join what runs in a row into one operator.

    rmsnorm [-> hadamard | * scale] -> quantize_int4        becomes  qpcompile::rmsnorm_quantize
    layer_norm [-> hadamard | * scale] -> quantize_int4     becomes  qpcompile::layernorm_quantize
    silu(gate) * up [-> hadamard | * scale] -> quantize_int4  becomes  qpcompile::silu_mul_quantize
    x * cos + cat(-x2, x1) * sin                            becomes  qpcompile::rope

The first three are computed in one wider type and rounded once, as codes (kernels/sums.py): float64 for float32 models,
whose norms and products may differ from that in the last bit; float32 for half precision, where what was rounded to
bfloat16 or float16 between norm, transform and quantizer no longer is. Rotary positions give float32 models the same
bits; half precision rounds once. A value with another reader is not fused away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.ir.edit import aten, call, calls, is_call, tidy
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

FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FuseKernels:
    """See the module's docstring."""

    name: ClassVar[str] = "fuse_kernels"
    needs: ClassVar[str] = "quantized"
    gives: ClassVar[str] = "fused"

    def run(self, program: Program) -> bool:
        """Returns whether anything was fused."""
        changed = False
        for graph in program.graphs.values():
            for node in list(calls(graph, QUANTIZE_INT4)):
                changed |= _fuse(graph, node)
            for node in list(calls(graph, aten.add.Tensor)):
                changed |= _fuse_rope(graph, node)
            tidy(graph)
        return changed


def _fuse(graph: Graph, quantize: fx.Node) -> bool:
    x, group_size, clip_ratio = quantize.args
    assert isinstance(x, fx.Node)
    source, scale, rotate = _split_transform(x)
    if (source is not x and len(x.users) > 1) or len(source.users) > 1:
        return False
    tail = (scale, rotate, group_size, clip_ratio)
    if is_call(source, RMSNORM) and value(source).dtype in FUSED_TYPES:
        new = call(graph, quantize, RMSNORM_QUANTIZE, *source.args, *tail, like=quantize)
    elif (norm := _layer_norm(source)) is not None:
        new = call(graph, quantize, LAYERNORM_QUANTIZE, *norm, *tail, like=quantize)
    elif (factors := _silu_mul(source)) is not None:
        new = call(graph, quantize, SILU_MUL_QUANTIZE, *factors, *tail, like=quantize)
    else:
        return False
    quantize.replace_all_uses_with(new)
    graph.module.graph.erase_node(quantize)
    return True


def _split_transform(x: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """(what is transformed, scale, whether it is rotated) of a quantizer's input."""
    if is_call(x, HADAMARD):
        source, scale = x.args
        assert isinstance(source, fx.Node)
        return source, scale if isinstance(scale, fx.Node) else None, True
    if is_call(x, aten.mul.Tensor) and isinstance(x.args[1], fx.Node) and x.args[1].op == "get_attr":
        source = x.args[0]
        assert isinstance(source, fx.Node)
        return source, x.args[1], False
    return x, None, False


def _layer_norm(node: fx.Node) -> tuple[Any, ...] | None:
    """(x, weight, bias, eps) where the node is a layer norm over the last axis, with weight and bias."""
    if not is_call(node, aten.layer_norm.default) or value(node).dtype not in FUSED_TYPES:
        return None
    x, shape, weight, bias, eps, *_ = [*node.args, *(None, None, 1e-5)[len(node.args) - 2 :]]
    plain = isinstance(shape, Sequence) and len(shape) == 1 and not node.kwargs
    return (x, weight, bias, eps) if plain and weight is not None and bias is not None else None


def _silu_mul(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(gate, up) where the node is silu(gate) * up, both of one type, and nothing else reads the silu."""
    if not is_call(node, aten.mul.Tensor) or value(node).dtype not in FUSED_TYPES:
        return None
    for gate, up in (node.args, node.args[::-1]):
        if not is_call(gate, aten.silu.default) or len(gate.users) != 1 or not isinstance(up, fx.Node):  # type: ignore[union-attr]
            continue
        if value(up).dtype == value(gate).dtype:
            return gate.args[0], up  # type: ignore[union-attr,return-value]
    return None


def _fuse_rope(graph: Graph, add: fx.Node) -> bool:
    """Join one sum if it turns the halves of a head, with the casts around it where it does that in float32."""
    found = _turned_halves(add)
    if found is None:
        return False
    x, cos, sin = found
    last, source = add, x
    if is_call(x, aten.to.dtype) and len(add.users) == 1:
        before, after = x.args[0], next(iter(add.users))
        assert isinstance(before, fx.Node)
        if is_call(after, aten.to.dtype) and value(after).dtype == value(before).dtype:
            last, source = after, before
    if value(source).dtype not in FUSED_TYPES or value(last).dtype != value(source).dtype:
        return False
    new = call(graph, last, ROPE, source, cos, sin, like=last)
    last.replace_all_uses_with(new)
    return True


def _turned_halves(add: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) where the node is x * cos + cat(-x2, x1) * sin, x = (x1, x2) along the last axis."""
    parts = [part for part in add.args if is_call(part, aten.mul.Tensor) and len(part.users) == 1]  # type: ignore[union-attr]
    if len(parts) != 2 or len(add.args) != 2 or add.kwargs:
        return None
    (x, cos), (turned, sin) = (part.args for part in parts)  # type: ignore[union-attr]
    if not (isinstance(x, fx.Node) and isinstance(cos, fx.Node) and isinstance(sin, fx.Node)):
        return None
    if not isinstance(turned, fx.Node) or not is_call(turned, aten.cat.default) or len(turned.users) != 1:
        return None
    halves, *axis = turned.args
    size = value(x).shape[-1]
    if [*axis, *turned.kwargs.values()] not in ([-1], [value(x).dim() - 1]) or not isinstance(size, int) or size % 2:
        return None
    if not isinstance(halves, Sequence) or len(halves) != 2 or not is_call(halves[0], aten.neg.default):
        return None
    if not (_is_half(halves[0].args[0], x, size // 2, size) and _is_half(halves[1], x, 0, size // 2)):
        return None
    tables = [value(table) for table in (cos, sin)]
    fits = all(table.shape[-1] == size and table.dim() <= value(x).dim() for table in tables)
    return (x, cos, sin) if fits and tables[0].dtype == tables[1].dtype and _same(value(add), value(x)) else None


def _is_half(node: Any, x: fx.Node, start: int, stop: int) -> bool:
    """Whether a node is x[..., start:stop]."""
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not x or node.kwargs:
        return False
    _, axis, first, last, *step = (*node.args, *(0, 0, value(x).shape[-1])[len(node.args) - 1 :])
    end = min(last, value(x).shape[-1]) if isinstance(last, int) else -1
    return axis in (-1, value(x).dim() - 1) and (first, end) == (start, stop) and step in ([], [1])


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return [str(size) for size in one.shape] == [str(size) for size in other.shape]
