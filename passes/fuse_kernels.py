"""Fuse norms, activations, transforms, quantizers, residual adds and rotary embeddings into single operators.

    rmsnorm -> end                              becomes  qpcompile::rmsnorm_quantize
    layer_norm -> end                           becomes  qpcompile::layernorm_quantize
    silu(x), gelu(x), x * sigmoid(1.702 * x) [* up] -> end  becomes  qpcompile::activation_quantize
    anything else -> end                        becomes  qpcompile::transform_quantize
    f(x) * up, x * sigmoid(1.702 * x)          becomes  qpcompile::activation, where nothing is quantized after it
    linear_int(...) + x                        becomes  qpcompile::linear_int(..., x)
    x * cos + cat(-x2, x1) * sin                becomes  qpcompile::rope

    end:  [-> kronecker | hadamard | * scale] [-> - shift] -> quantize_dynamic

The first five compute in one type and round to float32 once before the transform and once after it (kernels/sums.py):
separate norms and products of float32 models may differ in the last bit; in half precision the intermediate roundings
to bfloat16 or float16 disappear. A linear's result is rounded before the residual is added:
the sum is bit-identical. Fused rotary embeddings are bit-identical for float32 models; half precision rounds once. A
value with another reader is not fused.
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
    ACTIVATION,
    ACTIVATION_QUANTIZE,
    HADAMARD,
    KRONECKER,
    LAYERNORM_QUANTIZE,
    LINEAR_INT,
    QUANTIZE_DYNAMIC,
    QUANTIZERS,
    RMSNORM,
    RMSNORM_QUANTIZE,
    ROPE,
    TRANSFORM_QUANTIZE,
)
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.kernels.activation_quantize.reference import SLOPE
from qpcompile.stages import Stage

FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FuseKernels:
    """See the module's docstring."""

    name: ClassVar[str] = "fuse_kernels"
    purpose: ClassVar[str] = (
        "Fuse norms, activations, transforms, quantizers, residual adds and rotary embeddings into single operators."
    )
    needs: ClassVar[Stage] = "quantized"
    gives: ClassVar[Stage] = "fused"

    def run(self, program: Program) -> bool:
        """Returns whether anything was fused; fills `program.measured[NEAR_MISSES]` with what was not, and why."""
        changed, missed = False, list[NearMiss]()
        for graph in program.graphs.values():
            for rewrite, operators in REWRITES:
                for node in list(calls(graph, *operators)):
                    fused, reason = rewrite(graph, node)
                    changed |= fused is not None
                    if reason:
                        missed.append(NearMiss(graph.name, (fused or node).name, reason))
            tidy(graph)
        program.measured[NEAR_MISSES] = tuple(missed)
        return changed


@dataclass(frozen=True)
class _Chain:
    """A quantizer's input as transform(source); every value between them has one reader."""

    source: fx.Node
    scale: fx.Node | None = None
    rotate: bool = False
    left: fx.Node | None = None
    right: fx.Node | None = None
    shift: fx.Node | None = None

    @property
    def transform(self) -> tuple[Any, ...]:
        """The first operands of an epilogue."""
        return self.scale, self.rotate, self.left, self.right, self.shift


def _fuse(graph: Graph, quantize: fx.Node) -> tuple[fx.Node | None, str]:
    """Fuse a quantizer with what computes its input.

    Returns (the fused node, why what computes the transform's input is not in it; "" for no near miss).
    """
    x, *transform, group_size, clip_ratio, bits = quantize.args
    assert isinstance(x, fx.Node)
    chain = _Chain(x, *transform) if transform else _chain(x)  # type: ignore[arg-type]
    source = chain.source
    producer = _producer(source)
    if len(source.users) > 1 and (not isinstance(producer, str) or _is_transform(source)):
        producer = f"{source.name} has another reader"
    elif value(source).dtype not in FUSED_TYPES and producer != "":
        producer = f"{source.name} is {value(source).dtype}"
    reason = ""
    if isinstance(producer, str):
        reason = producer
        if transform or not any(chain.transform) or value(source).dtype not in FUSED_TYPES:
            return None, reason
        producer = TRANSFORM_QUANTIZE, (source,)
    operator, inputs = producer
    new = call(graph, quantize, operator, *inputs, *chain.transform, group_size, clip_ratio, bits, like=quantize)
    quantize.replace_all_uses_with(new)
    graph.module.graph.erase_node(quantize)
    return new, reason


def _chain(x: fx.Node) -> _Chain:
    """The transform before a quantizer of x."""
    x, shift = _before_cast(x), None
    if len(x.users) == 1 and (found := _by_vector(x, aten.sub.Tensor)):
        x, shift = _before_cast(found[0]), found[1]
    if len(x.users) == 1 and is_call(x, KRONECKER, HADAMARD):
        source, scale, *factors = x.args
        left, right = factors or (None, None)
        return _Chain(_before_cast(source), scale, not factors, left, right, shift)  # type: ignore[arg-type]
    if len(x.users) == 1 and (found := _by_vector(x, aten.mul.Tensor)):
        return _Chain(_before_cast(found[0]), found[1], shift=shift)
    return _Chain(x, shift=shift)


def _is_transform(x: fx.Node) -> bool:
    return is_call(x, KRONECKER, HADAMARD) or any(_by_vector(x, each) for each in (aten.sub.Tensor, aten.mul.Tensor))


def _by_vector(x: fx.Node, operator: OpOverload) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a sum or product with a weight f32[C]; None for anything else."""
    if not is_call(x, operator) or x.kwargs:
        return None
    source, vector = x.args
    if not isinstance(source, fx.Node) or not isinstance(vector, fx.Node) or vector.op != "get_attr":
        return None
    sizes, tensor = value(source).shape, value(vector)
    return (source, vector) if tensor.dtype == torch.float32 and list(tensor.shape) == list(sizes[-1:]) else None


def _before_cast(x: fx.Node) -> fx.Node:
    """The value that x is rounded from, if it is a cast between types that fused operators read."""
    if len(x.users) == 1 and is_call(x, aten.to.dtype) and isinstance(source := x.args[0], fx.Node):
        return source if {value(x).dtype, value(source).dtype} <= set(FUSED_TYPES) else x
    return x


def _producer(source: fx.Node) -> tuple[OpOverload, Sequence[Any]] | str:
    """(fused operator that starts with this node, its leading operands), or the reason why there is none."""
    if is_call(source, RMSNORM):
        return RMSNORM_QUANTIZE, source.args
    if is_call(source, aten.layer_norm.default):
        norm = operands(source)
        if len(norm["normalized_shape"]) != 1:
            return f"{source.name} normalizes over more than the last axis"
        if norm["weight"] is None or norm["bias"] is None:
            return f"{source.name} has no weight or no bias"
        return LAYERNORM_QUANTIZE, [norm[name] for name in ("input", "weight", "bias", "eps")]
    if is_call(source, ACTIVATION):
        return ACTIVATION_QUANTIZE, source.args
    if found := _activation(source):
        return ACTIVATION_QUANTIZE, (found[1], None, found[0])
    return _gate(source) if is_call(source, aten.mul.Tensor) else ""


def _gate(product: fx.Node) -> tuple[OpOverload, Sequence[Any]] | str:
    """The same for f(x) * up, where f(x) has no other reader."""
    reason = ""
    for inner, up in (product.args, product.args[::-1]):
        if not isinstance(inner, fx.Node) or (found := _activation(inner)) is None:
            continue
        if len(inner.users) > 1:
            reason = f"{inner.name} has another reader"
        elif not isinstance(up, fx.Node) or value(up).dtype != value(inner).dtype or not _same(value(up), value(inner)):
            reason = f"{product.name} multiplies by something other than a tensor of the same type and sizes"
        else:
            return ACTIVATION_QUANTIZE, (found[1], up, found[0])
    return reason


def _activation(node: fx.Node) -> tuple[str, fx.Node] | None:
    """(function of activation_quantize, its operand), if the node is one."""
    if is_call(node, aten.silu.default):
        return "silu", node.args[0]  # type: ignore[return-value]
    if is_call(node, aten.gelu.default):
        gelu = operands(node)
        return "gelu_tanh" if gelu["approximate"] == "tanh" else "gelu", gelu["input"]
    if is_call(node, aten.mul.Tensor):
        for x, sigmoid in (node.args, node.args[::-1]):
            inner = sigmoid.args[0] if is_call(sigmoid, aten.sigmoid.default) and len(sigmoid.users) == 1 else None  # type: ignore[union-attr]
            if is_call(inner, aten.mul.Tensor) and len(inner.users) == 1 and tuple(inner.args) == (x, SLOPE):  # type: ignore[union-attr]
                return "gelu_sigmoid", x  # type: ignore[return-value]
    return None


def _fuse_activation(graph: Graph, product: fx.Node) -> tuple[fx.Node | None, str]:
    """Fuse a gated product, or an activation function of several operators. Returns as `_fuse_rope`."""
    found = _gate(product) if product.users else ""
    if isinstance(found, str):
        plain, readers = _activation(product), list(product.users)
        # The function of a gate is fused with the gate.
        inner = len(readers) == 1 and is_call(readers[0], aten.mul.Tensor) and not isinstance(_gate(readers[0]), str)
        if plain is None or inner or not readers:
            # What a quantizer is not fused with is reported there.
            return None, "" if any(is_call(reader, *QUANTIZERS) for reader in readers) else found
        found = ACTIVATION_QUANTIZE, (plain[1], None, plain[0])
    _, (x, up, function) = found
    if value(x).dtype not in FUSED_TYPES:
        return None, f"{x.name} is {value(x).dtype}"
    new = call(graph, product, ACTIVATION, x, up, function, like=product)
    product.replace_all_uses_with(new)
    return new, ""


def _fuse_residual(graph: Graph, add: fx.Node) -> tuple[fx.Node | None, str]:
    """Fuse an add into the epilogue of a linear on codes. Returns as `_fuse_rope`."""
    if len(add.args) != 2 or add.kwargs:
        return None, ""
    reason = ""
    for y, x in (add.args, add.args[::-1]):
        if not isinstance(y, fx.Node) or not is_call(y, LINEAR_INT) or len(y.args) > 7:
            continue
        if len(y.users) > 1:
            reason = f"{y.name} has another reader"
        elif not isinstance(x, fx.Node) or value(x).dtype != value(y).dtype or not _same(value(x), value(y)):
            reason = f"{add.name} adds something other than a tensor of the same type and sizes"
        else:
            new = call(graph, add, LINEAR_INT, *y.args, x, like=y)
            add.replace_all_uses_with(new)
            graph.module.graph.erase_node(add)
            graph.module.graph.erase_node(y)
            return new, ""
    return None, reason


def _fuse_rope(graph: Graph, add: fx.Node) -> tuple[fx.Node | None, str]:
    """Fuse an add that is a rotary embedding, including the casts around it if it computes in float32.

    Returns (the fused node, why there is none; "" for no near miss).
    """
    found = _rotated_halves(add)
    if isinstance(found, str):
        return None, found
    x, cos, sin = found
    last, source = add, x
    if is_call(x, aten.to.dtype) and len(add.users) == 1:
        before, after = x.args[0], next(iter(add.users))
        assert isinstance(before, fx.Node)
        if is_call(after, aten.to.dtype) and value(after).dtype == value(before).dtype:
            last, source = after, before
    if value(source).dtype not in FUSED_TYPES or value(last).dtype != value(source).dtype:
        return None, f"{source.name} is {value(source).dtype}, {last.name} {value(last).dtype}"
    new = call(graph, last, ROPE, source, cos, sin, like=last)
    last.replace_all_uses_with(new)
    return new, ""


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


REWRITES = (
    (_fuse, (QUANTIZE_DYNAMIC, TRANSFORM_QUANTIZE)),
    (_fuse_activation, (aten.mul.Tensor,)),
    (_fuse_rope, (aten.add.Tensor,)),
    (_fuse_residual, (aten.add.Tensor,)),
)
"""Each rewrite, and the operators at which its pattern ends."""
