"""Every site that a recipe may quantize is marked, and every other one is recorded."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from programs import changed_recipe, program_of, run, traced
from torch import nn
from toy_decoder import HIDDEN, Mlp, decode_graph, prefill_graph, toy_feeds

from qpcompile.errors import RecipeError
from qpcompile.ir.edit import calls
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import HEAD, VISION, Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs

Apply = Callable[[Program, InsertQuantStubs], bool]
TOKENS = {"x": torch.ones(2, 5, HIDDEN)}
NO_HEAD = "quantize.ignore=[]"


class OneLayer(nn.Module):
    """A gated product called `layers.0`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def sites(graph: Graph) -> list[tuple[str, str, int | None]]:
    facts = [stub_fact(node) for node in calls(graph, QUANT_STUB)]
    return [(fact.site, fact.role, fact.layer) for fact in facts if fact is not None]


def test_golden(apply: Apply) -> None:
    graph = traced(OneLayer(), TOKENS)
    program = program_of(graph, recipe=changed_recipe("w4a4kv4", "quantize.ignore=[down_proj]"), stage="canonical")
    assert apply(program, InsertQuantStubs())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 8]
# layers.0
%1 = qpcompile::quant_stub(%0) : f32[B, S0, 8]
@layers.0.gate_proj.weight : f32[12, 8]
%2 = qpcompile::quant_stub(@layers.0.gate_proj.weight) : f32[12, 8]
%3 = aten::linear(%1, %2) : f32[B, S0, 12]
%4 = aten::silu(%3) : f32[B, S0, 12]
@layers.0.up_proj.weight : f32[12, 8]
%5 = qpcompile::quant_stub(@layers.0.up_proj.weight) : f32[12, 8]
%6 = aten::linear(%1, %5) : f32[B, S0, 12]
%7 = aten::mul.Tensor(%4, %6) : f32[B, S0, 12]
@layers.0.down_proj.weight : f32[8, 12]
%8 = aten::linear(%7, @layers.0.down_proj.weight) : f32[B, S0, 8]
return y = %8
""",
    )
    assert sites(graph) == [
        ("model.layers.0.gate_proj", "activation", 0),
        ("model.layers.0.gate_proj", "weight", 0),
        ("model.layers.0.up_proj", "weight", 0),
    ]
    left = [(item.graph, item.name, item.reason) for item in program.plan.left_out]
    assert left == [("prefill", "model.layers.0.down_proj", "quantize.ignore: down_proj")]


@pytest.mark.parametrize("recipe", ["none", "prune-30"])
def test_nothing_to_do(apply: Apply, recipe: str) -> None:
    program = program_of(traced(OneLayer(), TOKENS), recipe=recipe, stage="canonical")
    assert not apply(program, InsertQuantStubs())


def test_stubs_change_no_number(apply: Apply) -> None:
    prefill, decode = prefill_graph(gated=True), decode_graph(gated=True)
    feeds = toy_feeds(2, 6)
    expected = run(prefill, **feeds)
    program = program_of(prefill, decode, recipe=changed_recipe("w4a4kv4", NO_HEAD), layers=2)
    run_passes(program, [Canonicalize()])
    assert apply(program, InsertQuantStubs())
    for name, value in run(prefill, **feeds).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_cache_stubs_hold_the_new_tokens_only(apply: Apply, kind: str) -> None:
    graph = prefill_graph() if kind == "prefill" else decode_graph()
    other = decode_graph() if kind == "prefill" else prefill_graph()
    apply(
        program_of(graph, other, recipe=changed_recipe("w4a4kv4", NO_HEAD), stage="canonical", layers=2),
        InsertQuantStubs(),
    )
    stubs = {
        fact.site: node
        for node in calls(graph, QUANT_STUB)
        if (fact := stub_fact(node)) and fact.role in ("key", "value")
    }
    assert list(stubs) == [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    for node in stubs.values():
        assert "cat" not in str(node.args[0])
        assert graph.placeholder("inputs_embeds").meta["val"].shape[1] == node.meta["val"].shape[2]


def test_sixteen_bits_and_scopes_are_written_down(apply: Apply) -> None:
    graphs = [
        traced(OneLayer(), TOKENS),
        traced(Mlp(), TOKENS, name=VISION, owner="tower"),
        traced(nn.Linear(8, 3), {"input": torch.ones(2, 5, 8)}, name=HEAD, owner="lm_head"),
    ]
    program = program_of(*graphs, recipe=changed_recipe("w4a4kv4", "quantize.scope=[language]"), stage="canonical")
    assert apply(program, InsertQuantStubs())
    reasons = {item.name: item.reason for item in program.plan.left_out}
    assert reasons == {
        "lm_head": "the output head never has 4 bits",
        "tower.down_proj": "vision is not in quantize.scope",
        "tower.gate_proj": "vision is not in quantize.scope",
        "tower.up_proj": "vision is not in quantize.scope",
    }
    assert not sites(graphs[1]) and not sites(graphs[2])


def test_weights_of_sixteen_bits_get_no_stub(apply: Apply) -> None:
    settings = (
        "quantize.weights.bits=16",
        "quantize.activations.bits=16",
        "quantize.transform=none",
        "quantize.smooth=null",
        NO_HEAD,
    )
    program = program_of(traced(OneLayer(), TOKENS), recipe=changed_recipe("w4a4kv4", *settings), stage="canonical")
    assert not apply(program, InsertQuantStubs())
    assert {item.reason for item in program.plan.left_out} == {"the recipe leaves weights as they are"}


def test_computed_weight_is_no_site(apply: Apply) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight * 2)

    graph = traced(Scaled(8, 8), {"input": torch.ones(2, 5, 8)})
    assert not apply(
        program_of(graph, recipe=changed_recipe("w4a4kv4", NO_HEAD), stage="canonical"), InsertQuantStubs()
    )


@pytest.mark.parametrize(
    ("settings", "where", "message"),
    [
        (["quantize.ignore=[q_proj]"], "quantize.ignore", "'q_proj' matches no linear of this model"),
        (
            ["quantize.weights.granularity=group", NO_HEAD],
            "quantize.weights.group_size",
            "8 inputs, which 128 does not divide",
        ),
        (["quantize.activations.granularity=group", NO_HEAD], "quantize.activations.group_size", "8 inputs, which 128"),
    ],
)
def test_refusals(settings: list[str], where: str, message: str) -> None:
    program = program_of(traced(OneLayer(), TOKENS), recipe=changed_recipe("w4a4kv4", *settings), stage="canonical")
    with pytest.raises(RecipeError, match=message) as error:
        InsertQuantStubs().run(program)
    assert error.value.where == where and error.value.do


class Latents(nn.Module):
    """A layer that caches latents as keys, and values of no channels."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.sin(x), torch.cos(x)[:, None], x[:, None, :, :0]


def test_values_of_no_channels_are_not_marked() -> None:
    names = ("hidden", "past_key_values.0.key", "past_key_values.0.value")
    program = program_of(*(traced(Latents(), TOKENS, names, graph) for graph in ("prefill", "decode")))
    program.recipe, program.stage = changed_recipe("w4a8kv4", NO_HEAD), "canonical"
    assert InsertQuantStubs().run(program)
    assert [site for graph in program.language for site, *_ in sites(graph)] == ["model.layers.0.key"] * 2
