"""Merge linears that read the same codes into one product, and give each of them its part of the result.

    %q = linear_int(%c, %s, @wq, ...)      becomes      %y = linear_int(%c, %s, @wq_wk_wv, ...)
    %k = linear_int(%c, %s, @wk, ...)                   %q = aten::slice(%y, 2, 0, 128)
    %v = linear_int(%c, %s, @wv, ...)                   %k = aten::slice(%y, 2, 128, 256)
                                                         %v = aten::slice(%y, 2, 256, 384)

Projections of queries, keys and values, and gate and up projections: their rows are independent, so that results are
bit-identical. The slices are views. Linears stay apart if their types, scales per row or biases differ in kind, if a
residual is in the epilogue, and if something else reads a weight.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.ir.edit import (
    SHAPE_OPS,
    add_tensor,
    aten,
    call,
    calls,
    drop_tensor,
    get_tensor,
    infer,
    is_call,
    tidy,
)
from qpcompile.ir.near_miss import NearMiss, note_misses
from qpcompile.ir.node_facts import QuantizedFact, quantized_fact, set_fact
from qpcompile.ir.operators import LINEAR_INT
from qpcompile.ir.program import Graph, Program
from qpcompile.ir.shapes import value
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

WEIGHT, SCALE, BIAS, DTYPE, BITS, RESIDUAL = range(2, 8)
"""The places of operands of linear_int."""
Linears = tuple[fx.Node, ...]
Key = tuple[int, ...]
"""The addresses of the tensors of several linears."""


@dataclass(frozen=True)
class MergeLinears:
    """See the module's docstring. Weights that prefill and decode share are merged once, one set at a time."""

    name: ClassVar[str] = "merge_linears"
    purpose: ClassVar[str] = (
        "Merge linears that read the same codes into one product, and give each of them its part of the result."
    )
    needs: ClassVar[Stage] = "fused"
    gives: ClassVar[Stage] = "fused"

    def run(self, program: Program) -> bool:
        """Returns whether anything was merged; adds to `program.measured[NEAR_MISSES]` what was not, and why."""
        readers, missed, on = _readers(program), list[NearMiss](), Placement.of(program)
        places: dict[Key, list[tuple[Graph, Linears]]] = {}
        for graph in program.graphs.values():
            for linears in _alike(graph, missed):
                key = tuple(tensor.data_ptr() for node in linears for tensor in _tensors(graph, node))
                places.setdefault(key, []).append((graph, linears))
        merged = list[Graph]()
        for key, found in places.items():
            # A weight with another reader would be stored twice.
            if any(readers[address] != len(found) for address in key):
                reason = "something else reads one of the weights, or other linears share them in another graph"
                missed += [NearMiss(graph.name, linears[0].name, reason) for graph, linears in found]
            else:
                _merge(found, on)
                merged += [graph for graph, _ in found]
        for graph in {graph.name: graph for graph in merged}.values():
            tidy(graph)
        note_misses(program, missed)
        return bool(merged)


def _readers(program: Program) -> Counter[int]:
    """How many operators read the tensor at each address, in all graphs together."""
    return Counter(
        get_tensor(graph.module, str(node.target)).data_ptr()
        for graph in program.graphs.values()
        for node in graph.nodes
        if node.op == "get_attr"
        for _ in node.users
    )


def _tensors(graph: Graph, linear: fx.Node) -> Iterator[torch.Tensor]:
    """The weight of a linear, its scales, and its bias if there is one."""
    for node in linear.args[WEIGHT : BIAS + 1]:
        if isinstance(node, fx.Node):
            yield get_tensor(graph.module, str(node.target))


def _alike(graph: Graph, missed: list[NearMiss]) -> Iterator[Linears]:
    """Sets of at least two linears of a graph that read the same codes and are of one form."""
    sets: dict[tuple[Any, Any], dict[tuple[Any, ...], list[fx.Node]]] = {}
    for node in calls(graph, LINEAR_INT):
        sets.setdefault(node.args[:2], {}).setdefault(_form(node), []).append(node)  # type: ignore[arg-type]
    for of_one_form in sets.values():
        first = next(iter(of_one_form))
        for form, linears in of_one_form.items():
            if form is not first:
                reason = _difference(first, form)
                missed += [NearMiss(graph.name, node.name, f"{node.name} {reason}") for node in linears]
            if len(linears) > 1 and form[0] == "plain":
                yield tuple(linears)


def _form(node: fx.Node) -> tuple[Any, ...]:
    """What merged linears share: no residual, weights of the module, types, scales per row, bits, the bias's type."""
    bias = node.args[BIAS]
    weights = [each for each in node.args[WEIGHT : BIAS + 1] if isinstance(each, fx.Node)]
    kind = "residual" if len(node.args) > RESIDUAL and node.args[RESIDUAL] is not None else "plain"
    if any(each.op != "get_attr" for each in weights):
        kind = "computed"
    scales = value(node.args[SCALE]).shape[1]  # type: ignore[arg-type]
    stored = value(node.args[WEIGHT]).dtype  # type: ignore[arg-type]
    types = node.args[DTYPE], value(bias).dtype if isinstance(bias, fx.Node) else None
    return kind, types[0], scales, types[1], (stored, node.args[BITS])


def _difference(one: tuple[Any, ...], other: tuple[Any, ...]) -> str:
    """How a linear differs from the first that reads the same codes, by their forms."""
    if "residual" in (one[0], other[0]):
        return "reads the codes of a linear that adds a residual, or adds one"
    if "computed" in (one[0], other[0]):
        return "reads the codes of a linear whose weight the graph computes, or has one"
    what = ("", "another type", "other groups of inputs", "a bias of another type, or none", "other bits")
    place = next(index for index in range(1, 5) if one[index] != other[index])
    return f"has {what[place]} than the first linear on the same codes"


def _merge(places: Sequence[tuple[Graph, Linears]], on: Placement) -> None:
    """Merge one set of linears wherever it occurs; all places read the same tensors."""
    graph, linears = places[0]
    columns = range(WEIGHT, BIAS + 1 if isinstance(linears[0].args[BIAS], fx.Node) else BIAS)
    names = [[str(node.args[place].target) for node in linears] for place in columns]  # type: ignore[union-attr]
    joined = {
        _joined(each): on.keep(torch.cat([get_tensor(graph.module, name).detach() for name in each])) for each in names
    }
    for graph, linears in places:
        _replace(graph, linears, joined)
    # Now, not at the end of the pass: the program holds one set of weights twice at most.
    for module in {id(graph.module): graph.module for graph, _ in places}.values():
        for name in itertools.chain(*names):
            drop_tensor(module, name)


def _replace(graph: Graph, linears: Linears, joined: dict[str, torch.Tensor]) -> None:
    """Replace the linears of one graph by one on the tensors `joined`."""
    first = linears[0]
    made = [add_tensor(graph, name, tensor, first) for name, tensor in joined.items()]
    bias = made[2] if len(made) > 2 else None
    y = call(graph, first, LINEAR_INT, *first.args[:WEIGHT], *made[:2], bias, *first.args[DTYPE:RESIDUAL], like=first)
    facts = [fact for node in linears if (fact := quantized_fact(node)) is not None]
    if facts:
        set_fact(y, QuantizedFact(tuple(site for fact in facts for site in fact.sites), facts[0].kernel))
    sizes = [int(value(node).shape[-1]) for node in linears]
    ends = list(itertools.accumulate(sizes))
    for node, size, end in zip(linears, sizes, ends, strict=True):
        part = call(graph, node, aten.slice.Tensor, y, value(y).dim() - 1, end - size, end, like=node)
        node.replace_all_uses_with(part)
        weights = [each for each in node.args[WEIGHT : BIAS + 1] if isinstance(each, fx.Node)]
        graph.module.graph.erase_node(node)
        for weight in weights:
            if not weight.users:
                graph.module.graph.erase_node(weight)
        _view_again(graph, part)


def _view_again(graph: Graph, part: fx.Node) -> None:
    """Infer the views of a slice again: one that joins its last axis with another is a reshape, which copies."""
    for user in list(part.users):
        if is_call(user, *SHAPE_OPS):
            try:
                infer(graph, user)
            except (RuntimeError, ValueError):
                user.target = aten.reshape.default
                infer(graph, user)
            _view_again(graph, user)


def _joined(names: Sequence[str]) -> str:
    """The name of tensors that were concatenated: `layers.0.self_attn.q_proj_k_proj_v_proj.weight_packed`."""
    parts = [name.split(".") for name in names]
    owners = "_".join(each[-2] if len(each) > 1 else each[-1] for each in parts)
    return ".".join([*parts[0][:-2], owners, parts[0][-1]])
