"""Insert quantization stubs: at linear inputs and weights, and at keys and values before they enter the cache.

    %y = aten::linear(%x, @q_proj.weight)
      -> %s = qpcompile::quant_stub(%x)      activation, one per input, shared by the linears that read it
         %w = qpcompile::quant_stub(@q_proj.weight)
         %y = aten::linear(%s, %w)
    %y = qpcompile::expert_linear(%x, @experts.down_proj, %i)
      -> the same, with one weight stub for all experts of a layer; a weight that is stored transposed is turned once

Stubs are identity operators annotated with site, role and layer for later passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.errors import RecipeError
from qpcompile.ir.attention import appended
from qpcompile.ir.edit import add_tensor, aten, call, calls, get_tensor, is_call, layer_of, tidy
from qpcompile.ir.node_facts import Role, StubFact, set_fact, stub_fact
from qpcompile.ir.operators import EXPERT_LINEAR, QUANT_STUB
from qpcompile.ir.program import DECODE, PREFILL, PROJECTOR, VISION, Graph, Program, component_of
from qpcompile.ir.shapes import value
from qpcompile.recipe.plan import LeftOut
from qpcompile.recipe.quantize import HEAD_NAME, QuantizeScheme, matches_name
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

Turned = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Weights of experts that are stored transposed, by address, and their transposes: graphs share them."""
TURNED = "_turned"
"""The end of the name of a transposed weight."""
SCOPES = {VISION: "vision", PROJECTOR: "projector", PREFILL: "language", DECODE: "language"}


@dataclass(frozen=True)
class InsertQuantStubs:
    """See the module's docstring. Raises RecipeError for an ignore pattern that matches no linear."""

    name: ClassVar[str] = "insert_quant_stubs"
    purpose: ClassVar[str] = (
        "Insert quantization stubs: at linear inputs and weights, and at keys and values before they enter the cache."
    )
    needs: ClassVar[Stage] = "canonical"
    gives: ClassVar[Stage] = "stubbed"

    def run(self, program: Program) -> bool:
        """Returns whether the recipe quantizes anything."""
        scheme = program.recipe.quantize
        if scheme is None:
            return False
        left_out: list[LeftOut] = []
        turned: Turned = {}
        changed = False
        for graph in program.graphs.values():
            changed |= _stub_linears(graph, scheme, left_out)
            changed |= _stub_experts(graph, scheme, left_out, turned, Placement.of(program))
            if graph.name in (PREFILL, DECODE) and scheme.kv_cache.bits != 16:
                changed |= _stub_caches(graph)
            tidy(graph)
        _check_patterns(program, scheme)
        unique = {(item.graph, item.name): item for item in (*program.plan.left_out, *left_out)}
        program.plan = program.plan.changed(left_out=tuple(unique.values()))
        return changed


def site_name(graph: Graph, linear: fx.Node) -> str | None:
    """The dotted module name of a linear: its weight's name without `.weight`; None if the weight is computed."""
    weight = linear.args[1]
    while is_call(weight, QUANT_STUB):
        weight = weight.args[0]  # type: ignore[union-attr]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    path = [graph.owner, *str(weight.target).split(".")[:-1]]
    return ".".join(part for part in path if part)


def _stub_linears(graph: Graph, scheme: QuantizeScheme, left_out: list[LeftOut]) -> bool:
    stubs: dict[fx.Node, fx.Node] = {}
    changed = False
    for linear in list(calls(graph, aten.linear.default)):
        name = site_name(graph, linear)
        x, weight = linear.args[0], linear.args[1]
        if is_call(x, QUANT_STUB) or name is None:
            continue
        if reason := _left_out(graph, scheme, name):
            left_out.append(LeftOut(graph=graph.name, name=name, reason=reason))
            continue
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        _check_width(name, int(value(weight).shape[1]), scheme)
        if x not in stubs:
            stubs[x] = _stub(graph, linear, x, name, "activation")
        linear.replace_input_with(x, stubs[x])
        linear.replace_input_with(weight, _stub(graph, linear, weight, name, "weight"))
        changed = True
    return changed


def _stub_experts(graph: Graph, scheme: QuantizeScheme, left_out: list[LeftOut], turned: Turned, on: Placement) -> bool:
    stubs: dict[tuple[fx.Node, object], fx.Node] = {}
    changed = False
    for product in list(calls(graph, EXPERT_LINEAR)):
        x, weight, index = product.args
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        if is_call(x, QUANT_STUB):
            continue
        name = _experts_name(graph, weight)
        if reason := _left_out(graph, scheme, name) or _left_out_experts(scheme, weight):
            left_out.append(LeftOut(graph=graph.name, name=name, reason=reason))
            continue
        _check_width(name, int(value(weight).shape[2]), scheme)
        weight = _turn_weight(graph, product, weight, turned, on)
        # Experts that read one input by different choices have different statistics.
        if (x, index) not in stubs:
            stubs[x, index] = _stub(graph, product, x, name, "activation")
        product.replace_input_with(x, stubs[x, index])
        product.replace_input_with(weight, _stub(graph, product, weight, name, "weight"))
        changed = True
    return changed


def _experts_name(graph: Graph, weight: fx.Node) -> str:
    """The dotted name of a weight of experts: it is a parameter itself, and has nothing below it."""
    while weight.op == "call_function" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    target = str(weight.target).removesuffix(TURNED)
    return ".".join(part for part in (graph.owner, target) if part)


def _left_out_experts(scheme: QuantizeScheme, weight: fx.Node) -> str | None:
    if scheme.simulation == "qvlm":
        return "the simulation of Q-VLM has no experts"
    source = weight.args[0] if _is_turned(weight) else weight
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return "the graph computes the weights of these experts"
    return None


def _is_turned(weight: fx.Node) -> bool:
    """Whether a weight of experts is stored as f[E, K, N]."""
    return is_call(weight, aten.transpose.int) and sorted(axis % 3 for axis in weight.args[1:]) == [1, 2]  # type: ignore[operator]


def _turn_weight(graph: Graph, product: fx.Node, weight: fx.Node, turned: Turned, on: Placement) -> fx.Node:
    """The weight f[E, N, K] of a product as a tensor of its own; `turned`: by the address of what is stored."""
    if weight.op == "get_attr":
        return weight
    source = weight.args[0]
    assert isinstance(source, fx.Node)
    stored = get_tensor(graph.module, str(source.target))
    key = stored.data_ptr()
    if key not in turned:
        turned[key] = stored, on.keep(stored.detach().transpose(1, 2).contiguous())
    made = add_tensor(graph, f"{source.target}{TURNED}", turned[key][1], product)
    product.replace_input_with(weight, made)
    return made


def _check_width(name: str, width: int, scheme: QuantizeScheme) -> None:
    groups = {"weights": scheme.weights.kernel_group}
    if scheme.activations.bits != 16:
        groups["activations"] = scheme.activations.kernel_group
    for part, size in groups.items():
        if size and width % size:
            raise RecipeError(
                f"{name} has {width} inputs, which {size} does not divide",
                where=f"quantize.{part}.group_size",
                do="choose a size that divides the widths, no groups, or add the linear to quantize.ignore",
            )


def _left_out(graph: Graph, scheme: QuantizeScheme, name: str) -> str | None:
    if scheme.weights.bits == 16:
        return "the recipe leaves weights as they are"
    scope = SCOPES.get(component_of(graph.name))
    if scope is None:
        return "the output head never has 4 bits"
    if scope not in scheme.scope:
        return f"{scope} is not in quantize.scope"
    for pattern in scheme.ignore:
        if matches_name(pattern, name):
            return f"quantize.ignore: {pattern}"
    return None


def _stub_caches(graph: Graph) -> bool:
    """Insert stubs on keys and values entering the cache: on the output itself, or on what is appended to the past."""
    changed = False
    for path in graph.outputs:
        if not path.in_full_precision:
            continue
        result = graph.result(path)
        new = appended(result) or result
        # A layer that caches latents may have values of no channels.
        if stub_fact(new) or value(new).shape[-1] == 0:
            continue
        after = next(iter(graph.module.graph.nodes)) if new.op == "placeholder" else new.next
        site = f"{graph.owner}.layers.{path.layer}.{path.part}"
        stub = _stub(graph, after, new, site, "key" if path.part == "key" else "value")
        new.replace_all_uses_with(stub, delete_user_cb=lambda user, stub=stub: user is not stub)
        changed = True
    return changed


def _stub(graph: Graph, before: fx.Node, source: fx.Node, site: str, role: Role) -> fx.Node:
    node = call(graph, before, QUANT_STUB, source, like=source if source.op == "call_function" else before)
    node.meta["val"] = source.meta["val"]
    set_fact(node, StubFact(site, role, layer_of(node)))
    return node


def _check_patterns(program: Program, scheme: QuantizeScheme) -> None:
    names = {
        name
        for graph in program.graphs.values()
        for linear in calls(graph, aten.linear.default)
        if (name := site_name(graph, linear)) is not None
    }
    names |= {
        _experts_name(graph, product.args[1])  # type: ignore[arg-type]
        for graph in program.graphs.values()
        for product in calls(graph, EXPERT_LINEAR)
    }
    for pattern in scheme.ignore:
        # Presets name the head as most models do; no head has 4 bits, whatever its name.
        if pattern != HEAD_NAME and not any(matches_name(pattern, name) for name in names):
            raise RecipeError(
                f"the pattern {pattern!r} matches no linear of this model",
                where="quantize.ignore",
                do=f"use a name such as {min(names)}, or remove the pattern",
            )
