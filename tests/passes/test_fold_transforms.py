"""A change of basis before every linear: different tensors, the same answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from programs import changed_recipe, relative, run, stubbed, traced
from torch import Tensor, nn
from toy_decoder import HIDDEN, Mlp, Norm, cache_names, decode_graph, prefill_graph, toy_feeds

from qpcompile.ir.edit import aten, calls, get_tensor
from qpcompile.ir.operators import HADAMARD
from qpcompile.ir.program import DECODE, PREFILL, Graph, Program
from qpcompile.ir.text import graph_text
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.recipe.recipe import Recipe

Apply = Callable[[Program, FoldTransforms], bool]
TOKENS = {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}
# Float32 products with different rounding; a wrong basis causes errors of order 1.
TOLERANCE = 1e-5


class NormedMlp(nn.Module):
    """A norm and a gated product called `layers.0`; `kind` names a change that prevents folding."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.norm = Norm()
        self.layers = nn.ModuleList([Mlp()])
        self.narrow = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        mlp: Any = self.layers[0]
        up, gate = mlp.up_proj(normed), nn.functional.silu(mlp.gate_proj(normed))
        if self.kind == "a factor of one channel":
            up = self.narrow(x)
        if self.kind == "up is read twice":
            gate = gate + up
        y = mlp.down_proj(gate * up)
        return y + normed if self.kind == "the norm is read twice" else y


def recipe(*settings: str) -> Recipe:
    return changed_recipe(
        "w4a4kv4", "quantize.transform=hadamard", "quantize.ignore=[]", "quantize.center=null", *settings
    )


def test_golden(apply: Apply) -> None:
    graph = traced(NormedMlp(), TOKENS)
    program = stubbed(graph, recipe=recipe("quantize.ignore=[gate_proj]"))
    before = run(graph, **TOKENS)["y"]
    assert apply(program, FoldTransforms())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 8]
# norm
@norm.weight : f32[8]
%1 = qpcompile::rmsnorm(%0, @norm.weight, 1e-06) : f32[B, S0, 8]
@transforms.model_layers_0_up_proj : f32[8]
%2 = qpcompile::hadamard(%1, @transforms.model_layers_0_up_proj) : f32[B, S0, 8]
%3 = qpcompile::quant_stub(%2) : f32[B, S0, 8]
# layers.0
@layers.0.up_proj.weight : f32[12, 8]
%4 = qpcompile::quant_stub(@layers.0.up_proj.weight) : f32[12, 8]
%5 = aten::linear(%3, %4) : f32[B, S0, 12]
@layers.0.gate_proj.weight : f32[12, 8]
%6 = aten::linear(%1, @layers.0.gate_proj.weight) : f32[B, S0, 12]
# top
%7 = aten::silu(%6) : f32[B, S0, 12]
%8 = aten::mul.Tensor(%7, %5) : f32[B, S0, 12]
%9 = qpcompile::hadamard(%8, None) : f32[B, S0, 12]
%10 = qpcompile::quant_stub(%9) : f32[B, S0, 12]
# layers.0
@layers.0.down_proj.weight : f32[8, 12]
%11 = qpcompile::quant_stub(@layers.0.down_proj.weight) : f32[8, 12]
%12 = aten::linear(%10, %11) : f32[B, S0, 8]
return y = %12
""",
    )
    assert relative(run(graph, **TOKENS)["y"], before) < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [None, ("quantize.transform=none", "quantize.smooth=null", "quantize.kv_cache.rotate=false")],
    ids=["no quantization", "no change of basis"],
)
def test_nothing_to_do(apply: Apply, settings: tuple[str, ...] | None) -> None:
    chosen = changed_recipe("none") if settings is None else recipe(*settings)
    assert not apply(stubbed(prefill_graph(), decode_graph(), recipe=chosen, layers=2), FoldTransforms())


KINDS = list(itertools.product(("none", "hadamard"), ("null", "0.5"), ("true", "false"), ("4", "16")))[1:]


def decoded(prefill: Graph, decode: Graph) -> list[Tensor]:
    """Hidden states of a prompt of two rows, and of one token after it."""
    feeds = toy_feeds(2, 6)
    first = run(prefill, **feeds)
    past = {name.replace(".", "_"): first[name] for name in cache_names(2)}
    mask = torch.cat([feeds["attention_mask"], torch.ones(2, 1, dtype=torch.bool)], dim=1)
    second = run(decode, inputs_embeds=toy_feeds(2, 1, 9)["inputs_embeds"], attention_mask=mask, **past)
    return [first["hidden"][:, 1:], second["hidden"]]


@pytest.mark.parametrize(("transform", "smooth", "rotate", "bits"), KINDS)
def test_answers_stay(apply: Apply, transform: str, smooth: str, rotate: str, bits: str) -> None:
    prefill, decode = prefill_graph(gated=True), decode_graph(gated=True)
    expected = decoded(prefill, decode)
    names = {"transform": transform, "smooth": smooth, "kv_cache.rotate": rotate, "kv_cache.bits": bits}
    program = stubbed(
        prefill, decode, recipe=recipe(*(f"quantize.{key}={value}" for key, value in names.items())), layers=2
    )
    changes = transform != "none" or smooth != "null" or (rotate == "true" and bits == "4")
    assert apply(program, FoldTransforms()) == changes
    for found, wanted in zip(decoded(prefill, decode), expected, strict=True):
        assert relative(found, wanted) < TOLERANCE


def test_prefill_and_decode_share_their_tensors(apply: Apply) -> None:
    program = stubbed(prefill_graph(gated=True), decode_graph(gated=True), recipe=recipe(), layers=2)
    apply(program, FoldTransforms())
    weights = [str(node.target) for node in program.graphs[PREFILL].nodes if node.op == "get_attr"]
    assert weights
    for name in weights:
        pair = [get_tensor(program.graphs[graph].module, name) for graph in (PREFILL, DECODE)]
        assert torch.equal(*pair), name


@pytest.mark.parametrize("kind", ["a factor of one channel", "up is read twice", "the norm is read twice"])
def test_what_cannot_be_folded_becomes_a_node(apply: Apply, kind: str) -> None:
    graph = traced(NormedMlp(kind), TOKENS)
    expected = run(graph, **TOKENS)["y"]
    assert apply(stubbed(graph, recipe=recipe("quantize.transform=none")), FoldTransforms())
    online = [
        node for node in calls(graph, aten.mul.Tensor) if "transforms." in str(getattr(node.args[1], "target", ""))
    ]
    assert len(online) == 1 + (kind == "a factor of one channel")
    assert relative(run(graph, **TOKENS)["y"], expected) < TOLERANCE


class SharedValues(nn.Module):
    """Attention whose values are also keys: their linear must not change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"kv": nn.Linear(8, 8), "o": nn.Linear(8, 8)})])

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, ...]:
        x, layer = inputs_embeds, self.layers[0]
        held = layer["kv"](x).view(*x.shape[:2], 2, 4).transpose(1, 2)  # type: ignore[index]
        key = torch.cos(held)
        y = nn.functional.scaled_dot_product_attention(x.view(*x.shape[:2], 2, 4).transpose(1, 2), key, held)
        return layer["o"](y.transpose(1, 2).reshape(x.shape)), key, held  # type: ignore[index]


def test_values_that_something_else_reads_are_not_folded(apply: Apply) -> None:
    feeds = {"inputs_embeds": TOKENS["x"]}
    graph = traced(SharedValues(), feeds, ("hidden", *cache_names(1)))
    decode = traced(SharedValues(), feeds, ("hidden", *cache_names(1)), DECODE)
    expected = run(graph, **feeds)
    program = stubbed(graph, decode, recipe=recipe("quantize.smooth=null"))
    assert FoldTransforms().run(program)
    found = run(graph, **feeds)
    assert relative(found["hidden"], expected["hidden"]) < TOLERANCE
    assert relative(found["past_key_values.0.value"], expected["past_key_values.0.value"]) < TOLERANCE
    assert len(list(calls(graph, HADAMARD))) == 4  # both linears' inputs, the key and its query


class Router(nn.Module):
    """A linear whose weight is a parameter of its own name, as the scores of experts have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ParameterDict({"scores": nn.Parameter(torch.randn(4, HIDDEN))})])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layers[0]["scores"])  # type: ignore[index]


def test_a_weight_of_another_name_gets_a_bias_beside_it(apply: Apply) -> None:
    graph = traced(Router(), TOKENS)
    expected = run(graph, **TOKENS)["y"]
    assert apply(stubbed(graph, recipe=recipe("quantize.center=0")), FoldTransforms())
    (linear,) = calls(graph, aten.linear.default)
    assert str(getattr(linear.args[2], "target", "")) == "layers.0.scores_bias"
    assert relative(run(graph, **TOKENS)["y"], expected) < TOLERANCE
