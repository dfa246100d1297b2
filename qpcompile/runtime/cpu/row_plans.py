"""Bind each row operator of a graph to one C call that holds its weights (kernels/native/rows.py).

    %q = rmsnorm_quantize(%x, @weight, eps, @scale, ...)      becomes      %q = rows(%x)

One operator becomes one call: what is fused was fused by the compiler. Weights are laid out here, since a recorded
decode step would record that too. Results are the operators' own, up to the summation order of torch's norms. An
operator of another type, or with weights that the graph computes, is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qpcompile.ir.edit import aten, calls, get_tensor, is_call, operands
from qpcompile.ir.operators import (
    ACTIVATION,
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
"""Operators with the epilogue of transform_quantize; in C for rows in float64 too."""
OTHERS: tuple[Any, ...] = (QUANTIZE_DYNAMIC, KRONECKER, HADAMARD, RMSNORM, aten.layer_norm.default, ACTIVATION)


@dataclass(frozen=True)
class Rows:
    """A row operator: the kind of rows, their input nodes, whether they are quantized, and arguments of a RowPlan."""

    kind: Kind
    sources: tuple[Any, ...]
    quantized: bool
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])


def bind_rows(graph: Graph) -> None:
    """Bind every row operator of a bound graph; dead nodes are left for the caller to remove."""
    binder = _Binder(graph.module, value_types(graph))
    for node in list(calls(graph, *FUSED)):
        binder.bind(node, _fused(node), (*TYPES, torch.float64))
    for node in list(calls(graph, *OTHERS)):
        if (rows := _other(node)) is not None:
            binder.bind(node, rows, TYPES)


@dataclass(frozen=True)
class _Binder:
    module: fx.GraphModule
    types: dict[fx.Node, ValueType]

    def bind(self, node: fx.Node, rows: Rows, types: tuple[torch.dtype, ...]) -> None:
        """Bind an operator, if C has these rows."""
        kind = self.type(rows.sources[0])
        channels = (kind.sizes[-1].fixed or 0) if kind.sizes else 0
        arguments = {name: self.tensor(each) for name, each in rows.arguments.items()}
        known = not any(isinstance(each, fx.Node) for each in arguments.values())
        if kind.dtype not in types or not (channels and known and self.alike(rows)):
            return
        plan = RowPlan(rows.kind, kind.dtype, channels, **arguments)
        _replace(node, plan.quantized if rows.quantized else plan.stored, rows.sources)

    def alike(self, rows: Rows) -> bool:
        """Whether all inputs, and weights of a norm that is stored, have one type: the result's."""
        read = rows.sources if rows.quantized else (*rows.sources, *map(rows.arguments.get, ("weight", "bias")))
        return len({self.type(each).dtype for each in read if each is not None}) == 1

    def type(self, node: Any) -> ValueType:
        """The type of a node; `UNKNOWN` for anything that is not one."""
        return self.types.get(node, UNKNOWN) if isinstance(node, fx.Node) else UNKNOWN

    def tensor(self, node: Any) -> Any:
        """The module's tensor of a get_attr node; anything else unchanged."""
        if is_list(node):
            return tuple(self.tensor(each) for each in node)
        known = isinstance(node, fx.Node) and node.op == "get_attr"
        return get_tensor(self.module, str(node.target)) if known else node


def _fused(node: fx.Node) -> Rows:
    """One of the `FUSED` operators."""
    x, *rest = node.args[:-8]
    scale, rotate, left, right, shift, group_size, clip_ratio, bits = node.args[-8:]
    end = {"scale": scale, "factors": rotate if left is None else (left, right), "shift": shift}
    end |= {"group_size": group_size, "clip_ratio": clip_ratio, "bits": bits}
    if is_call(node, ACTIVATION_QUANTIZE):
        up, function = rest
        return Rows(KINDS[str(function)], (x,) if up is None else (x, up), True, end)
    if is_call(node, TRANSFORM_QUANTIZE):
        return Rows("plain", (x,), True, end)
    *weights, eps = rest
    named = dict(zip(("weight", "bias"), weights, strict=False))
    return Rows("rmsnorm" if len(weights) == 1 else "layernorm", (x,), True, named | {"constant": eps} | end)


def _other(node: fx.Node) -> Rows | None:
    """One of the `OTHERS`; None if C has no such rows."""
    every: tuple[Any, ...] = node.args
    if is_call(node, ACTIVATION):
        x, up, function = every
        return Rows(KINDS[function], (x,) if up is None else (x, up), False)
    if is_call(node, QUANTIZE_DYNAMIC):
        x, group_size, clip_ratio, bits = every
        return Rows("plain", (x,), True, {"group_size": group_size, "clip_ratio": clip_ratio, "bits": bits})
    if is_call(node, KRONECKER, HADAMARD):
        x, scale, *factors = every
        return Rows("plain", (x,), False, {"scale": scale, "factors": tuple(factors) or True})
    if is_call(node, RMSNORM):
        x, weight, eps = every
        return Rows("rmsnorm", (x,), False, {"weight": weight, "constant": eps, "as_graph": True})
    norm = operands(node)
    if len(norm["normalized_shape"]) != 1 or norm["weight"] is None or norm["bias"] is None:
        return None
    weights = {"weight": norm["weight"], "bias": norm["bias"]}
    return Rows("layernorm", (norm["input"],), False, weights | {"constant": norm["eps"]})


def _replace(node: fx.Node, function: Callable[..., Any], sources: tuple[Any, ...]) -> None:
    """Replace `node` by function(*sources)."""

    def rows(*tensors: torch.Tensor) -> Any:
        return function(*tensors)

    node.target, node.args, node.kwargs = rows, sources, {}
    node.meta[IS_ROWS] = True
