"""Canonicalize traced graphs: remove assertions, empty caches and no-ops, eliminate common subexpressions, fuse norms.

    %a = aten::to.dtype(%x, f32)          (x is f32 already)
    %b = aten::pow(%a, 2) ... %g = aten::mul(@weight, %f)
      -> %g = qpcompile::rmsnorm(%x, @weight, 1e-06)

Dead code is removed at the end. Exact: every output of a graph is bit-identical before and after.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.ir.common_subexpressions import merge_equal_calls
from qpcompile.ir.edit import add_tensor, aten, call, calls, get_tensor, is_call, operands, tidy
from qpcompile.ir.operators import RMSNORM
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.stages import Stage

ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
COPIES = (
    aten.detach_.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.alias.default,
    aten.dropout.default,
)
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
WHOLE = 2**62


@dataclass(frozen=True)
class Canonicalize:
    """See the module's docstring."""

    name: ClassVar[str] = "canonicalize"
    purpose: ClassVar[str] = (
        "Canonicalize traced graphs: remove assertions, empty caches and no-ops, eliminate common subexpressions, "
        "fuse norms."
    )
    needs: ClassVar[Stage] = "captured"
    gives: ClassVar[Stage] = "canonical"

    def run(self, program: Program) -> bool:
        """Returns whether any graph changed."""
        changed = [canonicalize(graph) for graph in program.graphs.values()]
        return any(changed)


def canonicalize(graph: Graph) -> bool:
    """Rewrite one graph; returns whether it changed."""
    changed = _drop_assertions(graph)
    changed |= _drop_empty_caches(graph)
    changed |= _multiply_powers(graph)
    changed |= _drop_no_ops(graph)
    changed |= _merge_equal_tensors(graph)
    changed |= merge_equal_calls(graph)
    if _fuse_norms(graph):
        _merge_equal_tensors(graph)
        changed = True
    return tidy(graph) or changed


def _drop_assertions(graph: Graph) -> bool:
    unread = [node for node in calls(graph, *ASSERTIONS) if not node.users]
    for node in unread:
        graph.module.graph.erase_node(node)
    return bool(unread)


def _multiply_powers(graph: Graph) -> bool:
    """Expand powers of sizes into products: side ** 2 patches of a square picture become side * side."""
    powers = [node for node in calls(graph, operator.pow, pow) if isinstance(node.args[1], int) and node.args[1] > 0]
    for node in powers:
        size, exponent = node.args
        assert isinstance(exponent, int)
        product = size
        for _ in range(exponent - 1):
            product = call(graph, node, operator.mul, product, size)
        assert isinstance(product, fx.Node)
        node.replace_all_uses_with(product)
        graph.module.graph.erase_node(node)
    return bool(powers)


def _drop_no_ops(graph: Graph) -> bool:
    changed = False
    for node in graph.nodes:
        if node.op == "call_function" and _is_no_op(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.module.graph.erase_node(node)
            changed = True
    return changed


def _is_no_op(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if node.target in COPIES:
        return True
    if node.target in CASTS:
        before, after = source.meta.get("val"), node.meta.get("val")
        return before is not None and after is not None and (before.dtype, before.device) == (after.dtype, after.device)
    if node.target is aten.slice.Tensor:
        start, end, step = (operands(node)[name] for name in ("start", "end", "step"))
        return start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end >= WHOLE))
    return False


def _drop_empty_caches(graph: Graph) -> bool:
    """Fold `cat([empty, k], -2)` to k: prefill starts from an empty cache."""
    changed = False
    for node in list(calls(graph, aten.cat.default)):
        parts = node.args[0]
        assert isinstance(parts, (list, tuple))
        full = [part for part in parts if isinstance(part, fx.Node) and not _is_empty(graph, part)]
        if len(full) == 1 and len(parts) > 1 and value(full[0]).dtype == value(node).dtype:
            node.replace_all_uses_with(full[0])
            graph.module.graph.erase_node(node)
            changed = True
    return changed


def _is_empty(graph: Graph, node: fx.Node) -> bool:
    while is_call(node, *COPIES):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node.op == "get_attr" and get_tensor(graph.module, str(node.target)).numel() == 0


def _merge_equal_tensors(graph: Graph) -> bool:
    """One `get_attr` node per tensor name, at the top of the graph."""
    first: dict[str, fx.Node] = {}
    changed = False
    for node in graph.nodes:
        if node.op == "get_attr":
            kept = first.setdefault(str(node.target), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.module.graph.erase_node(node)
                changed = True
    return changed


def _fuse_norms(graph: Graph) -> bool:
    found = [match for node in calls(graph, aten.rsqrt.default) if (match := _match_norm(node)) is not None]
    for x, scale, eps, end in found:
        weight = scale if scale.op == "get_attr" else _one_plus(graph, scale, end)
        norm = call(graph, end, RMSNORM, x, weight, eps)
        norm.meta["val"] = end.meta["val"]
        end.replace_all_uses_with(norm)
    return bool(found)


def _match_norm(rsqrt: fx.Node) -> tuple[fx.Node, fx.Node, float, fx.Node] | None:
    """(input, scale, eps, last node) of the norm around an rsqrt node, or None if the pattern does not match.

    Two forms are matched: weight * cast(x * r), and (x * r) * (1 + weight) in float32. Half-precision models cast x
    before the second and the result after it: both casts stay.
    """
    shifted = rsqrt.args[0]
    if not is_call(shifted, aten.add.Tensor) or not isinstance(shifted.args[1], float):  # type: ignore[union-attr]
        return None
    mean, eps = shifted.args  # type: ignore[union-attr]
    if not is_call(mean, aten.mean.dim) or list(mean.args[1:]) != [[-1], True]:
        return None
    square = mean.args[0]  # type: ignore[union-attr]
    if not is_call(square, aten.pow.Tensor_Scalar) or square.args[1] != 2:  # type: ignore[union-attr]
        return None
    wide = square.args[0]  # type: ignore[union-attr]
    product = next(iter(rsqrt.users), None)
    if len(rsqrt.users) != 1 or product is None or not is_call(product, aten.mul.Tensor) or wide not in product.args:
        return None
    x, narrow = wide, product
    cast = next(iter(product.users), product)
    if is_call(wide, *CASTS) and len(product.users) == 1 and is_call(cast, *CASTS):
        x, narrow = wide.args[0], cast
    end = next(iter(narrow.users), None)
    if len(narrow.users) != 1 or end is None or not is_call(end, aten.mul.Tensor):
        return None
    scale = end.args[0] if end.args[1] is narrow else end.args[1]
    if not isinstance(x, fx.Node) or not isinstance(scale, fx.Node) or not isinstance(eps, float):
        return None
    assert isinstance(wide, fx.Node)
    # The operator squares in float32 and casts to the type of x; any other order of casts rounds at another place.
    if value(wide).dtype != torch.float32 or value(narrow).dtype != value(x).dtype or value(scale).ndim != 1:
        return None
    if scale.op == "get_attr" or (x.meta["val"].dtype == torch.float32 and _is_one_plus(scale)):
        return x, scale, eps, end
    return None


def _is_one_plus(scale: fx.Node) -> bool:
    return is_call(scale, aten.add.Tensor) and scale.args[1] in (1.0,) and _weight(scale).op == "get_attr"


def _weight(scale: fx.Node) -> fx.Node:
    """The first operand of a sum, before a cast."""
    (source,) = scale.args[:1]
    source = source.args[0] if is_call(source, *CASTS) else source  # type: ignore[union-attr]
    return source if isinstance(source, fx.Node) else scale


def _one_plus(graph: Graph, scale: fx.Node, before: fx.Node) -> fx.Node:
    name = str(_weight(scale).target)
    wide = get_tensor(graph.module, name).detach().to(value(scale).dtype)
    return add_tensor(graph, f"{name}_plus_one", wide + 1.0, before)
