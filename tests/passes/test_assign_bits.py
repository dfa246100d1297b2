"""Bits per site: what the operators after it get, the budget, shared inputs, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import expecttest
import pytest
import torch
from programs import changed_recipe, stubbed, traced
from torch import nn
from toy_decoder import HIDDEN, Mlp, decode_graph, prefill_graph

from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.errors import CalibrationError, RecipeError
from qpcompile.ir.edit import calls
from qpcompile.ir.near_miss import NEAR_MISSES
from qpcompile.ir.node_facts import set_fact, stub_fact
from qpcompile.ir.operators import LINEAR_INT, LINEAR_W4A16, LINEAR_W8A16, QUANT_STUB, QUANTIZE_DYNAMIC
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.ir.text import graph_text
from qpcompile.passes.assign_bits import AssignBits
from qpcompile.passes.merge_linears import MergeLinears
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.quantization.loss_sensitivity import LOSS_SENSITIVITY, LossSensitivity
from qpcompile.recipe.recipe import Recipe

Apply = Callable[[Program, AssignBits], bool]
TOKENS = {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}


class OneLayer(nn.Module):
    """A gated product called `layers.0`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Mlp()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


ASSIGN = AssignBits([], 0)


def measured(program: Program) -> Program:
    """A program in which every linear's errors cost the same."""
    facts = [stub_fact(stub) for graph in program.graphs.values() for stub in calls(graph, QUANT_STUB)]
    sites = {fact.site: (1.0, 1.0) for fact in facts if fact is not None and fact.role == "weight"}
    program.measured[LOSS_SENSITIVITY] = LossSensitivity(sites)
    return program


def recipe(*settings: str) -> Recipe:
    return changed_recipe("w4a4kv4", "quantize.ignore=[]", *settings)


def decoder(*settings: str) -> Program:
    return measured(stubbed(prefill_graph(gated=True), decode_graph(gated=True), recipe=recipe(*settings), layers=2))


def facts(program: Program, graph: str, role: str) -> dict[str, int | None]:
    found = [stub_fact(stub) for stub in calls(program.graphs[graph], QUANT_STUB)]
    return {fact.site: fact.bits for fact in found if fact is not None and fact.role == role}


def test_golden(apply: Apply) -> None:
    """A third of the weights may have 8 bits: the down projection, whose input is rounded worst."""
    graph = traced(OneLayer(), TOKENS)
    program = measured(stubbed(graph, recipe=recipe("quantize.mean_bits={weights: 5.4, activations: 5.4}")))
    before = graph_text(graph)
    assert not apply(program, ASSIGN) and graph_text(graph) == before
    QuantizeWeights().run(program)
    lines = [line for line in graph_text(graph).splitlines() if "qpcompile" in line or "weight_" in line]
    expecttest.assert_expected_inline(
        "\n".join(line.partition(" : ")[0] for line in lines),
        """\
%1 = qpcompile::quantize_dynamic(%0, 0, 1.0, 4)
@layers.0.gate_proj.weight_packed
@layers.0.gate_proj.weight_scale
%4 = qpcompile::linear_int(%2, %3, @layers.0.gate_proj.weight_packed, @layers.0.gate_proj.weight_scale, None, f32, 4)
@layers.0.up_proj.weight_packed
@layers.0.up_proj.weight_scale
%6 = qpcompile::linear_int(%2, %3, @layers.0.up_proj.weight_packed, @layers.0.up_proj.weight_scale, None, f32, 4)
%8 = qpcompile::quantize_dynamic(%7, 0, 1.0, 8)
@layers.0.down_proj.weight_codes
@layers.0.down_proj.weight_scale
%11 = qpcompile::linear_int(%9, %10, @layers.0.down_proj.weight_codes, @layers.0.down_proj.weight_scale, None, f32, 8)\
""",
    )
    bits = {(entry.part, entry.name.rpartition(".")[2]): entry.bits for entry in program.plan.bits}
    assert bits == {
        ("activations", "gate_proj"): 4,
        ("activations", "down_proj"): 8,
        ("weights", "gate_proj"): 4,
        ("weights", "down_proj"): 8,
    }
    assert [(site.weight_bits, site.activation_bits) for site in program.plan.sites] == [(8, 8), (4, 4), (4, 4)]


@pytest.mark.parametrize("part", ["weights", "activations"])
@pytest.mark.parametrize("mean", [4.0, 4.5, 6.0, 8.0])
def test_the_mean_is_kept_and_the_worst_sites_are_raised(apply: Apply, part: str, mean: float) -> None:
    program = decoder(f"quantize.mean_bits.{part}={mean}")
    assert not apply(program, ASSIGN)
    found = program.plan.bits
    assert {entry.part for entry in found} == {part}
    assert sum(entry.bits * entry.size for entry in found) <= mean * sum(entry.size for entry in found)
    assert {4.0: {4}, 8.0: {8}}.get(mean, {4, 8}) == {entry.bits for entry in found}
    assert all(entry.cost_raised < entry.cost / 20 for entry in found)
    # Of two sites of one size the worse one is raised.
    for one in found:
        assert not [
            other for other in found if one.size == other.size and one.bits > other.bits and one.cost < other.cost
        ]
    role = part.removesuffix("s")
    assert facts(program, PREFILL, role) == facts(program, DECODE, role)
    other = "activation" if role == "weight" else "weight"
    assert set(facts(program, PREFILL, other).values()) == {None}


def test_linears_on_one_input_share_bits_and_are_still_merged(apply: Apply) -> None:
    program = decoder("quantize.mean_bits={weights: 6, activations: 6}")
    apply(program, ASSIGN)
    QuantizeWeights().run(program)
    program.stage = "fused"
    MergeLinears().run(program)
    # Of each layer: q, k, v; o; gate, up; down.
    assert all(len(list(calls(program.graphs[name], LINEAR_INT))) == 8 for name in (PREFILL, DECODE))
    assert not program.measured.get(NEAR_MISSES)


def test_other_bits_on_one_input_are_a_near_miss() -> None:
    """A weight that got other bits by hand remains apart, and the pass says why."""
    program = decoder()
    for name in (PREFILL, DECODE):
        for stub in calls(program.graphs[name], QUANT_STUB):
            fact = stub_fact(stub)
            if fact is not None and fact.role == "weight" and fact.site.endswith("0.self_attn.v_proj"):
                set_fact(stub, replace(fact, bits=8))
    QuantizeWeights().run(program)
    program.stage = "fused"
    MergeLinears().run(program)
    assert {miss.reason.partition(" has ")[2] for miss in program.measured[NEAR_MISSES]} == {
        "other bits than the first linear on the same codes"
    }


def test_weights_alone(apply: Apply) -> None:
    program = decoder("quantize.mean_bits.weights=6", "quantize.activations.bits=16")
    apply(program, ASSIGN)
    QuantizeWeights().run(program)
    for operator in (LINEAR_W4A16, LINEAR_W8A16):
        assert list(calls(program.graphs[PREFILL], operator)), operator
    assert not list(calls(program.graphs[PREFILL], QUANTIZE_DYNAMIC))


def test_nothing_to_do(apply: Apply) -> None:
    for program in (decoder(), stubbed(traced(OneLayer(), TOKENS), recipe=Recipe.load("none"))):
        assert not apply(program, ASSIGN)
        assert program.plan.bits == () and set(facts(program, PREFILL, "weight").values()) <= {None}


def test_a_site_without_samples_is_refused() -> None:
    program = decoder("quantize.mean_bits.activations=5")
    del program.measured[CALIBRATION].inputs["model.layers.1.mlp.down_proj"]
    with pytest.raises(CalibrationError, match="no calibration sample reached it") as caught:
        ASSIGN.run(program)
    assert caught.value.where == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (
            ("quantize.mean_bits.weights=4.5", "quantize.weights.bits=8", "quantize.activations.bits=8"),
            "mean_bits.weights",
        ),
        (("quantize.mean_bits.activations=4.5", "quantize.activations.bits=8"), "mean_bits.activations"),
        (("quantize.mean_bits.activations=3",), "mean_bits.activations"),
        (("quantize.mean_bits.weights=5", "quantize.simulation=qvlm"), "mean_bits"),
        (
            ("quantize.mean_bits.weights=5", "quantize.activations.bits=16", "quantize.weights.granularity=group"),
            "weights.granularity",
        ),
    ],
)
def test_refused_recipes(settings: tuple[str, ...], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        recipe(*settings)
