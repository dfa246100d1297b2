"""Fuse chains of row operators in a bound graph into one C call each (kernels/native/rows.py).

    %n = rmsnorm(%x, @w, eps);  %k = kronecker(%n, @scale, @left, @right);  %c = sub(%k, @shift)
    %q = quantize_dynamic(%c, group, clip, bits)
      -> %q = rows(%x)

Every part except the quantizer is optional. A chain is fused only if its intermediate values have no other reader, and
it rounds where the graph rounds: results are those of separate operators, except for the summation order and, in norms,
a multiplication for a division or a division for a multiplication. Graphs of `numerics: exact`, which cast to float64
in between, are not fused; operators that the compiler fused are bound to their weights in them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qpcompile.ir.edit import aten, calls, get_tensor, is_call
from qpcompile.ir.operators import (
    ACTIVATION_QUANTIZE,
    HADAMARD,
    KRONECKER,
    LAYERNORM_QUANTIZE,
    QUANTIZE_DYNAMIC,
    RMSNORM,
    RMSNORM_QUANTIZE,
    TRANSFORM_QUANTIZE,
)
from qpcompile.ir.program import Graph
from qpcompile.ir.types import UNKNOWN, ValueType, value_types
from qpcompile.kernels.activation_quantize.cpu import KINDS
from qpcompile.kernels.native.rows import Kind, RowPlan
from qpcompile.nested import is_list

TYPES = (torch.float32, torch.bfloat16)
# Name of the nodes that are one C call on rows.
IS_ROWS = "is_rows"
FUSED: tuple[Any, ...] = (TRANSFORM_QUANTIZE, RMSNORM_QUANTIZE, LAYERNORM_QUANTIZE, ACTIVATION_QUANTIZE)
"""Operators that end with the epilogue of transform_quantize."""


@dataclass(frozen=True)
class Rows:
    """The start of a chain: the kind of rows, their input nodes, and arguments of a RowPlan."""

    kind: Kind
    sources: tuple[Any, ...]
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])


def join_rows(graph: Graph) -> None:
    """Fuse every chain of a bound graph; dead nodes are left for the caller to remove."""
    joiner = _Joiner(graph.module, value_types(graph))
    for node in list(calls(graph, *FUSED)):
        joiner.join_fused(node)
    for node in list(calls(graph, QUANTIZE_DYNAMIC)):
        joiner.join_quantizer(node)
    for node in list(calls(graph, KRONECKER, HADAMARD)):
        joiner.join(node, Rows("plain", (node.args[0],)), joiner.change(node))
    for node in list(graph.nodes):
        joiner.join(node, joiner.rows(node), {})


@dataclass(frozen=True)
class _Joiner:
    module: fx.GraphModule
    types: dict[fx.Node, ValueType]

    def type(self, node: Any) -> ValueType:
        """The type of a node; `UNKNOWN` for a new node and anything that is not a node."""
        return self.types.get(node, UNKNOWN) if isinstance(node, fx.Node) else UNKNOWN

    def dtype(self, node: Any) -> torch.dtype | None:
        """The dtype of a node; None if it is not a tensor."""
        return self.type(node).dtype

    def channels(self, node: Any) -> int:
        """The size of a node's last axis, 0 if unknown."""
        sizes = self.type(node).sizes
        return (sizes[-1].fixed or 0) if sizes else 0

    def join_fused(self, node: fx.Node) -> None:
        """Bind an operator that the compiler fused already to its weights."""
        rows = _rows_of(node)
        scale, rotate, left, right, shift, group_size, clip_ratio, bits = node.args[-8:]
        factors = rotate if left is None else (left, right)
        change = {
            "scale": scale,
            "factors": factors,
            "shift": shift,
            "group_size": group_size,
            "clip_ratio": clip_ratio,
            "bits": bits,
        }
        if (plan := self.plan(rows, change, as_graph=False)) is not None:
            _replace(node, plan.quantized, rows.sources)

    def join_quantizer(self, node: fx.Node) -> None:
        """Fuse a quantizer with the producer of its rows and their basis change."""
        change: dict[str, Any] = {}
        every: tuple[Any, ...] = node.args
        x, group_size, clip_ratio, bits = every
        if is_call(x, aten.sub.Tensor) and self.is_inner(x) and not x.kwargs and self.is_vector(x.args[1]):
            change["shift"], x = x.args[1], x.args[0]
        if is_call(x, KRONECKER, HADAMARD) and self.is_inner(x) and (found := self.change(x)) is not None:
            change, x = change | found, x.args[0]
        rows = (self.rows(x) if isinstance(x, fx.Node) and self.is_inner(x) else None) or Rows("plain", (x,))
        plan = self.plan(rows, change | {"group_size": group_size, "clip_ratio": clip_ratio, "bits": bits})
        if plan is not None:
            _replace(node, plan.quantized, rows.sources)

    def join(self, node: fx.Node, rows: Rows | None, change: dict[str, Any] | None) -> None:
        """Fuse a chain whose rows are stored unquantized."""
        if rows is not None and change is not None and (plan := self.plan(rows, change)) is not None:
            _replace(node, plan.stored, rows.sources)

    def plan(self, rows: Rows, change: dict[str, Any], as_graph: bool = True) -> RowPlan | None:
        """The plan, or None if C has no such rows: other types, or weights that the graph computes."""
        dtype, channels = self.dtype(rows.sources[0]), self.channels(rows.sources[0])
        arguments = {name: self.tensor(each) for name, each in (rows.arguments | change).items()}
        known = not any(isinstance(each, fx.Node) for each in arguments.values())
        fits = dtype in TYPES or (dtype == torch.float64 and not as_graph)
        alike = all(self.dtype(each) == dtype for each in rows.sources)
        if dtype is None or not (fits and channels and known and alike):
            return None
        return RowPlan(rows.kind, dtype, channels, **arguments, as_graph=as_graph)

    def change(self, node: fx.Node) -> dict[str, Any] | None:
        """The basis change of a kronecker or hadamard node; None if its factors are computed in the graph."""
        scale, *factors = (self.tensor(each) for each in node.args[1:])
        if any(isinstance(each, fx.Node) for each in (scale, *factors)) or self.dtype(node) not in TYPES:
            return None
        return {"scale": scale, "factors": tuple(factors) or True}

    def rows(self, node: fx.Node) -> Rows | None:
        """How a node computes rows, if intermediate values have no other reader; None if C has no such kind."""
        if is_call(node, RMSNORM, aten.layer_norm.default):
            return self.norm(node)
        return self.gate(node) if is_call(node, aten.mul.Tensor) else None

    def norm(self, node: fx.Node) -> Rows | None:
        """A norm over the last axis with its weights, all of one type."""
        every: tuple[Any, ...] = node.args
        if is_call(node, RMSNORM):
            x, weight, eps = every
            weights = {"weight": weight}
        else:
            x, _, weight, bias, eps = (*every, *(None, None, 1e-5)[len(every) - 2 :])[:5]
            weights = {"weight": weight, "bias": bias}
            if len(every[1]) != 1:
                return None
        bound = all(isinstance(each, fx.Node) and each.op == "get_attr" for each in weights.values())
        if not bound or any(self.dtype(each) != self.dtype(x) for each in weights.values()):
            return None
        kind: Kind = "rmsnorm" if len(weights) == 1 else "layernorm"
        return Rows(kind, (x,), weights | {"constant": eps})

    def gate(self, node: fx.Node) -> Rows | None:
        """silu(gate) * up and x * sigmoid(constant * x)."""
        for left, right in (node.args, node.args[::-1]):
            if self.type(left) != self.types[node] or self.type(right) != self.types[node]:
                continue
            if not self.is_inner(right) or not is_call(right, aten.silu.default, aten.sigmoid.default):
                continue
            x: Any = right.args[0]
            if self.type(x) != self.types[node]:
                continue
            if right.target is aten.silu.default:
                return Rows("silu_then_mul", (x, left))
            if is_call(x, aten.mul.Tensor) and x.args[0] is left and isinstance(x.args[1], float):
                return Rows("sigmoid_mul", (left,), {"constant": x.args[1]})
        return None

    def is_inner(self, node: Any) -> bool:
        """Whether a node has exactly one reader."""
        return isinstance(node, fx.Node) and len(node.users) == 1

    def is_vector(self, node: Any) -> bool:
        """Whether a node is a weight f32[C]."""
        tensor = self.tensor(node)
        return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.dim() == 1

    def tensor(self, node: Any) -> Any:
        """The module's tensor of a get_attr node; anything else unchanged."""
        if is_list(node):
            return tuple(self.tensor(each) for each in node)
        known = isinstance(node, fx.Node) and node.op == "get_attr"
        return get_tensor(self.module, str(node.target)) if known else node


def _rows_of(node: fx.Node) -> Rows:
    """How one of the `FUSED` operators computes its rows."""
    x, *rest = node.args[:-8]
    if is_call(node, ACTIVATION_QUANTIZE):
        up, function = rest
        return Rows(KINDS[str(function)], (x,) if up is None else (x, up))
    if is_call(node, TRANSFORM_QUANTIZE):
        return Rows("plain", (x,))
    *weights, eps = rest
    named = dict(zip(("weight", "bias"), weights, strict=False))
    return Rows("rmsnorm" if len(weights) == 1 else "layernorm", (x,), named | {"constant": eps})


def _replace(node: fx.Node, function: Callable[..., Any], sources: tuple[Any, ...]) -> None:
    """Replace `node` by function(*sources)."""

    def rows(*tensors: torch.Tensor) -> Any:
        return function(*tensors)

    node.target, node.args, node.kwargs = rows, sources, {}
    node.meta[IS_ROWS] = True
