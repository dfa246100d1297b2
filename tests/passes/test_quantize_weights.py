"""Weights packed to 4 bits, once for all graphs, and linears bound to integer operators."""

from __future__ import annotations

from collections.abc import Callable

import expecttest
import pytest
import torch
from programs import changed_recipe, relative, run, stubbed, traced
from torch import nn
from toy_decoder import HIDDEN, Mlp, decode_graph, prefill_graph

from qpcompile.errors import InvariantError, RecipeError
from qpcompile.ir.edit import aten, calls, get_tensor
from qpcompile.ir.node_facts import quantized_fact
from qpcompile.ir.operators import LINEAR_INT, LINEAR_W4A16, LINEAR_W8A16, QUANTIZE_DYNAMIC
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.ir.text import graph_text
from qpcompile.ir.verify import verify
from qpcompile.kernels.linear_int.packing import codes_of
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe

Apply = Callable[[Program, QuantizeWeights], bool]
TOKENS = {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}


class OneLayer(nn.Module):
    """A gated product called `layers.0`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Mlp()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def recipe(*settings: str) -> Recipe:
    return changed_recipe("w4a4kv4", "quantize.ignore=[]", *settings)


def test_golden_w4a4(apply: Apply) -> None:
    graph = traced(OneLayer(), TOKENS)
    assert apply(stubbed(graph, recipe=recipe("quantize.ignore=[up_proj]")), QuantizeWeights())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 8]
# layers.0
%1 = qpcompile::quantize_dynamic(%0, 0, 1.0, 4) : (i8[B, S0, 8], f32[B, S0, 1])
%2 = operator.getitem(%1, 0) : i8[B, S0, 8]
%3 = operator.getitem(%1, 1) : f32[B, S0, 1]
@layers.0.gate_proj.weight_packed : u8[12, 4]
@layers.0.gate_proj.weight_scale : f32[12, 1]
%4 = qpcompile::linear_int(%2, %3, @layers.0.gate_proj.weight_packed, @layers.0.gate_proj.weight_scale, None, f32, 4) : f32[B, S0, 12]
%5 = aten::silu(%4) : f32[B, S0, 12]
@layers.0.up_proj.weight : f32[12, 8]
%6 = aten::linear(%0, @layers.0.up_proj.weight) : f32[B, S0, 12]
%7 = aten::mul.Tensor(%5, %6) : f32[B, S0, 12]
%8 = qpcompile::quantize_dynamic(%7, 0, 1.0, 4) : (i8[B, S0, 12], f32[B, S0, 1])
%9 = operator.getitem(%8, 0) : i8[B, S0, 12]
%10 = operator.getitem(%8, 1) : f32[B, S0, 1]
@layers.0.down_proj.weight_packed : u8[8, 6]
@layers.0.down_proj.weight_scale : f32[8, 1]
%11 = qpcompile::linear_int(%9, %10, @layers.0.down_proj.weight_packed, @layers.0.down_proj.weight_scale, None, f32, 4) : f32[B, S0, 8]
return y = %11
""",  # noqa: E501
    )


def test_golden_w4a16(apply: Apply) -> None:
    graph = traced(OneLayer(), TOKENS)
    program = stubbed(graph, recipe=changed_recipe("w4a16", "quantize.ignore=[up_proj, down_proj]"))
    assert apply(program, QuantizeWeights())
    expecttest.assert_expected_inline(
        graph_text(graph),
        """\
graph prefill of model
%0 = input x : f32[B, S0, 8]
# layers.0
@layers.0.gate_proj.weight_packed : u8[12, 4]
@layers.0.gate_proj.weight_scale : f32[12, 1]
%1 = qpcompile::linear_w4a16(%0, @layers.0.gate_proj.weight_packed, @layers.0.gate_proj.weight_scale, None) : f32[B, S0, 12]
%2 = aten::silu(%1) : f32[B, S0, 12]
@layers.0.up_proj.weight : f32[12, 8]
%3 = aten::linear(%0, @layers.0.up_proj.weight) : f32[B, S0, 12]
%4 = aten::mul.Tensor(%2, %3) : f32[B, S0, 12]
@layers.0.down_proj.weight : f32[8, 12]
%5 = aten::linear(%4, @layers.0.down_proj.weight) : f32[B, S0, 8]
return y = %5
""",  # noqa: E501
    )


def test_golden_w8a8(apply: Apply) -> None:
    graph = traced(OneLayer(), TOKENS)
    eight = ("quantize.weights.bits=8", "quantize.activations.bits=8", "quantize.activations.clip_ratio=0.9")
    assert apply(stubbed(graph, recipe=recipe("quantize.ignore=[up_proj, down_proj]", *eight)), QuantizeWeights())
    quantized = [line for line in graph_text(graph).splitlines() if "qpcompile" in line or "codes" in line]
    assert quantized == [
        "%1 = qpcompile::quantize_dynamic(%0, 0, 0.9, 8) : (i8[B, S0, 8], f32[B, S0, 1])",
        "@layers.0.gate_proj.weight_codes : i8[12, 8]",
        "%4 = qpcompile::linear_int(%2, %3, @layers.0.gate_proj.weight_codes, @layers.0.gate_proj.weight_scale, None, "
        "f32, 8) : f32[B, S0, 12]",
    ]


@pytest.mark.parametrize("name", ["none", "prune-30"])
def test_nothing_to_do(apply: Apply, name: str) -> None:
    assert not apply(stubbed(traced(OneLayer(), TOKENS), recipe=Recipe.load(name)), QuantizeWeights())


# Rounding to steps of max/7 changes a value by at most max/14; two such roundings, of values around max/3.
BITS = [(4, 4, 0.35, 0.2), (4, 8, 0.2, 0.2), (8, 8, 0.02, 0.01), (4, 16, 0.2, 0.2), (8, 16, 0.02, 0.01)]


@pytest.mark.parametrize(("weight_bits", "bits", "most", "most_of_site"), BITS)
@pytest.mark.parametrize("solver", ["gptq", "rtn"])
@pytest.mark.parametrize("groups", [False, True])
def test_numbers(
    apply: Apply, weight_bits: int, bits: int, most: float, most_of_site: float, solver: str, groups: bool
) -> None:
    if groups and (weight_bits, bits) == (8, 16):
        pytest.skip("the recipe refuses it")

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.proj = nn.Linear(HIDDEN, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x)

    settings = [f"quantize.weights.solver={solver}", "quantize.ignore=[]", f"quantize.weights.bits={weight_bits}"]
    settings += [f"quantize.activations.bits={bits}", "quantize.transform=none", "quantize.smooth=null"]
    if groups:
        settings += ["quantize.weights.granularity=group", "quantize.weights.group_size=4"]
    graph = traced(Single(), TOKENS)
    expected = run(graph, **TOKENS)["y"]
    program = stubbed(graph, recipe=changed_recipe("w4a4kv4", *settings))
    assert apply(program, QuantizeWeights())
    linear = next(calls(graph, LINEAR_INT, LINEAR_W4A16, LINEAR_W8A16))
    parts = ("weight_packed" if weight_bits == 4 else "weight_codes", "weight_scale", "bias")
    stored, scale, bias = (get_tensor(graph.module, f"proj.{part}") for part in parts)
    assert stored.nbytes == 6 * HIDDEN * weight_bits // 8 and scale.shape == (6, 2 if groups else 1)
    weight = codes_of(stored, HIDDEN).double() * scale.double().repeat_interleave(HIDDEN // scale.shape[1], dim=1)
    x = TOKENS["x"].double()
    if bits != 16:
        step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        x = (x / step).round() * step
    found = run(graph, **TOKENS)["y"]
    assert relative(found, x @ weight.T + bias.double()) < 1e-6  # the same sum, rounded to float32 at the end
    assert relative(found, expected) < most
    (site,) = program.plan.sites
    assert (site.graph, site.name, site.weight_bits) == ("prefill", "model.proj", weight_bits)
    assert site.kernel == str(linear.target.name()) and site.error is not None and 0 < site.error < most_of_site  # type: ignore[union-attr]
    fact = quantized_fact(linear)
    assert fact is not None and fact.sites == ("model.proj",) and fact.kernel == site.kernel


def test_prefill_and_decode_share_their_codes(apply: Apply) -> None:
    program = stubbed(prefill_graph(gated=True), decode_graph(gated=True), recipe=recipe(), layers=2)
    assert apply(program, QuantizeWeights())
    modules = [program.graphs[name].module for name in (PREFILL, DECODE)]
    names = [name for name, _ in modules[0].named_buffers() if name.endswith(("_packed", "_scale"))]
    assert len(names) == 2 * 14
    for name in names:
        assert get_tensor(modules[0], name).data_ptr() == get_tensor(modules[1], name).data_ptr()
    assert not [name for name, tensor in modules[0].named_parameters() if tensor.ndim == 2]
    # One quantizer for the linears that share an input: q/k/v, o, gate/up, down.
    assert len(list(calls(program.graphs[PREFILL], QUANTIZE_DYNAMIC))) == 2 * 4
    assert len(program.plan.sites) == 2 * 14
    assert program.plan == Plan.from_dict(program.plan.to_dict())


def test_what_has_no_stub_stays(apply: Apply) -> None:
    graph = traced(OneLayer(), TOKENS)
    assert not apply(stubbed(graph, recipe=recipe("quantize.ignore=['re:.*']")), QuantizeWeights())
    assert len(list(calls(graph, aten.linear.default))) == 3


def test_a_linear_that_runs_twice_is_one_site(apply: Apply) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(torch.relu(self.proj(x)))

    program = stubbed(traced(Recurrent(), TOKENS), recipe=recipe())
    assert apply(program, QuantizeWeights())
    assert [site.name for site in program.plan.sites] == ["model.proj"]


def test_refused_group_size() -> None:
    program = stubbed(traced(OneLayer(), TOKENS), recipe=recipe())
    program.recipe = recipe("quantize.weights.granularity=group", "quantize.weights.group_size=5")
    with pytest.raises(RecipeError, match="8 inputs, which 5 does not divide") as error:
        QuantizeWeights().run(program)
    assert error.value.where == "quantize.weights.group_size"


def test_hand_broken_graph_is_named(apply: Apply) -> None:
    program = stubbed(traced(OneLayer(), TOKENS), recipe=recipe())
    apply(program, QuantizeWeights())
    delattr(program.graphs[PREFILL].module.layers.get_submodule("0").up_proj, "weight_packed")  # type: ignore[union-attr]
    with pytest.raises(InvariantError, match=r"prefill: .* reads the tensor layers.0.up_proj.weight_packed"):
        verify(program)
