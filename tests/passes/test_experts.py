"""Experts of a mixture through the passes that quantize: stubs, statistics, changes of basis, clips, bits, codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from programs import HERE, changed_recipe, relative, run, stubbed, traced
from torch import Tensor, nn
from toy_decoder import HIDDEN

from qpcompile.calibration.collect import _by_expert, _marks
from qpcompile.calibration.statistics import CALIBRATION, InputStatistics, expert_site
from qpcompile.errors import RecipeError
from qpcompile.ir.edit import aten, calls, get_tensor
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import (
    EXPERT_LINEAR,
    EXPERT_LINEAR_A16,
    EXPERT_LINEAR_INT,
    HADAMARD,
    KRONECKER,
    QUANTIZE_STATIC,
)
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.ir.shapes import value
from qpcompile.ir.text import graph_text
from qpcompile.kernels.linear_int.packing import codes_of
from qpcompile.passes.fold_transforms import FoldTransforms
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.passes.search_clips import SearchClips, best_clip
from qpcompile.quality.meter import _unrounded
from qpcompile.quantization.products import solve_weight
from qpcompile.recipe.quantize import WeightScheme
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import VISUAL

Apply = Callable[[Program, Any], bool]
TOKENS = {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}
EXPERTS, INNER = 3, 12


class Experts(nn.Module):
    """Two of three experts per token; `kind` names how their weights are there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        first, second = torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 3, torch.randn(EXPERTS, HIDDEN, INNER) / 3
        if kind == "transposed":
            first, second = first.transpose(1, 2).contiguous(), second.transpose(1, 2).contiguous()
        self.gate_up_proj, self.down_proj = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        first, second = self.gate_up_proj, self.down_proj
        if self.kind == "transposed":
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        if self.kind == "computed":
            second = second * 2
        gate, up = EXPERT_LINEAR(x.unsqueeze(1), first, index).chunk(2, dim=-1)
        return EXPERT_LINEAR(nn.functional.silu(gate) * up, second, index)


class Mixture(nn.Module):
    """A router, experts and a shared linear, on tokens in one list, as decoder layers have them."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.experts = Experts(kind)
        self.router, self.shared = nn.Linear(HIDDEN, EXPERTS, bias=False), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weights, index = self.router(rows).softmax(dim=-1).topk(2, dim=-1)
        y = (self.experts(rows, index) * weights.unsqueeze(-1)).sum(dim=1)
        return (y + self.shared(rows)).view(x.shape)


class Decoder(nn.Module):
    """The mixture as `layers.0`."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Mixture(kind)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


SITES = ("model.layers.0.experts.gate_up_proj", "model.layers.0.experts.down_proj")
EXACT_ROUTER = "quantize.ignore=[router, shared]"
"""The choice of experts stays, so that numbers can be compared."""


def recipe(*settings: str, preset: str = "w4a8kv4") -> Recipe:
    return changed_recipe(preset, EXACT_ROUTER, *settings)


def with_experts(program: Program, unseen: tuple[int, ...] = ()) -> Program:
    """Statistics of the tokens of each expert but the `unseen`, different for each."""
    inputs, made = program.measured[CALIBRATION].inputs, torch.Generator().manual_seed(7)
    for site, width in zip(SITES, (HIDDEN, INNER), strict=True):
        for expert in set(range(EXPERTS)) - set(unseen):
            found = InputStatistics.empty(width, moments=True)
            found.add(torch.randn(200, width, generator=made) @ torch.randn(width, width, generator=made), keep=0)
            inputs[expert_site(site, expert)] = found
    return program


def test_golden_stubs(apply: Apply) -> None:
    graph = traced(Decoder(), TOKENS)
    stubbed(graph, recipe=recipe())
    lines = [line for line in graph_text(graph).splitlines() if "quant_stub" in line or "expert_linear" in line]
    expecttest.assert_expected_inline(
        "\n".join(lines),
        """\
%10 = qpcompile::quant_stub(%9) : f32[B*S0, 1, 8]
%11 = qpcompile::quant_stub(@layers.0.experts.gate_up_proj) : f32[3, 24, 8]
%12 = qpcompile::expert_linear(%10, %11, %8) : f32[B*S0, 2, 24]
%18 = qpcompile::quant_stub(%17) : f32[B*S0, 2, 12]
%19 = qpcompile::quant_stub(@layers.0.experts.down_proj) : f32[3, 8, 12]
%20 = qpcompile::expert_linear(%18, %19, %8) : f32[B*S0, 2, 8]""",
    )


def test_golden_w4a8(apply: Apply) -> None:
    graph = traced(Decoder(), TOKENS)
    assert apply(stubbed(graph, recipe=recipe()), QuantizeWeights())
    lines = [line for line in graph_text(graph).splitlines() if "qpcompile" in line or "experts" in line]
    expecttest.assert_expected_inline(
        "\n".join(lines),
        """\
%10 = qpcompile::quantize_dynamic(%9, 0, 1.0, 8) : (i8[B*S0, 1, 8], f32[B*S0, 1, 1])
@layers.0.experts.gate_up_proj_packed : u8[3, 24, 4]
@layers.0.experts.gate_up_proj_scale : f32[3, 24, 1]
%13 = qpcompile::expert_linear_int(%11, %12, @layers.0.experts.gate_up_proj_packed, @layers.0.experts.gate_up_proj_scale, %8, f32, 8) : f32[B*S0, 2, 24]
%19 = qpcompile::quantize_dynamic(%18, 0, 1.0, 8) : (i8[B*S0, 2, 12], f32[B*S0, 2, 1])
@layers.0.experts.down_proj_packed : u8[3, 8, 6]
@layers.0.experts.down_proj_scale : f32[3, 8, 1]
%22 = qpcompile::expert_linear_int(%20, %21, @layers.0.experts.down_proj_packed, @layers.0.experts.down_proj_scale, %8, f32, 8) : f32[B*S0, 2, 8]""",  # noqa: E501
    )


# Rounding to steps of max/7 changes a value by at most max/14.
BITS = [(4, 4, 0.4), (4, 8, 0.3), (8, 8, 0.03), (4, 16, 0.3), (8, 16, 0.03)]


@pytest.mark.parametrize(("weight_bits", "bits", "most"), BITS)
@pytest.mark.parametrize("solver", ["gptq", "rtn"])
@pytest.mark.parametrize("kind", ["", "transposed"])
def test_numbers(apply: Apply, weight_bits: int, bits: int, most: float, solver: str, kind: str) -> None:
    graph, plain = traced(Decoder(kind), TOKENS), traced(Decoder(), TOKENS).module
    expected = run(graph, **TOKENS)["y"]
    settings = [f"quantize.weights.{key}" for key in (f"solver={solver}", f"bits={weight_bits}")]
    settings += [f"quantize.activations.bits={bits}", "quantize.activations.clip_search=false"]
    program = with_experts(stubbed(graph, recipe=recipe(*settings)))
    assert apply(program, QuantizeWeights())
    assert relative(run(graph, **TOKENS)["y"], expected) < most
    assert not list(calls(graph, EXPERT_LINEAR)) and not program.plan.left_out[2:]
    products = list(calls(graph, EXPERT_LINEAR_A16 if bits == 16 else EXPERT_LINEAR_INT))
    assert len(products) == 2
    for product, site in zip(products, SITES, strict=True):
        dense = get_tensor(plain, site.removeprefix("model.")).detach()
        place = 1 if bits == 16 else 2
        stored, scale = (get_tensor(graph.module, str(node.target)) for node in product.args[place : place + 2])  # type: ignore[union-attr]
        assert stored.nbytes == dense.numel() * weight_bits // 8 and scale.shape == (*dense.shape[:2], 1)
        codes = torch.stack([codes_of(own, dense.shape[2]) for own in stored])
        assert relative(codes * scale, dense) < (0.2 if weight_bits == 4 else 0.01)
    sites = [site for site in program.plan.sites if "experts" in site.name]
    assert [site.name for site in sites] == sorted(SITES)
    assert all(site.error is not None and 0 < site.error < 0.3 for site in sites)
    assert [site.unseen_experts for site in sites] == [0, 0]


def test_each_expert_is_solved_on_its_own_tokens() -> None:
    """Moments of one expert only matter to it, and GPTQ beats rounding to nearest on them."""
    torch.manual_seed(2)
    weight = torch.randn(EXPERTS, 5, HIDDEN)
    rows = torch.randn(EXPERTS, 400, HIDDEN) @ torch.randn(EXPERTS, HIDDEN, HIDDEN)
    inputs: dict[str, InputStatistics] = {}
    for site, tokens in (("x", rows.flatten(0, 1)), *((f"x[{expert}]", own) for expert, own in enumerate(rows))):
        inputs[site] = InputStatistics.empty(HIDDEN, moments=True)
        inputs[site].add(tokens, keep=0)

    def lost(given: dict[str, InputStatistics], **scheme: Any) -> list[float]:
        solved = solve_weight(weight, "x", given, WeightScheme(clip_search=False, **scheme), torch.device("cpu"))
        dense = solved.codes * solved.scale
        return [relative(x @ own.T, x @ exact.T) for x, own, exact in zip(rows, dense, weight, strict=True)]

    own, nearest = lost(inputs), lost(inputs, solver="rtn")
    shared = lost({"x": inputs["x"]})
    assert sum(own) < sum(shared) < sum(nearest)
    without = {name: found for name, found in inputs.items() if name != "x[1]"}
    other = lost(without)
    assert other[0] == own[0] and other[2] == own[2] and other[1] == shared[1]


def test_experts_that_no_token_chose_are_told(apply: Apply, caplog: pytest.LogCaptureFixture) -> None:
    graph = traced(Decoder(), TOKENS)
    program = with_experts(stubbed(graph, recipe=recipe()), unseen=(1,))
    assert apply(program, QuantizeWeights())
    assert [site.unseen_experts for site in program.plan.sites if "experts" in site.name] == [1, 1]
    assert "2 experts, in 2 weights, were chosen by no calibration token" in caplog.text


@pytest.mark.parametrize("transform", ["none", "hadamard", "flatquant"])
@pytest.mark.parametrize("settings", [(), ("quantize.center=0.0",), ("quantize.scaling=awq", "quantize.smooth=null")])
def test_a_change_of_basis_changes_no_answer(apply: Apply, transform: str, settings: tuple[str, ...]) -> None:
    """Also with a mean that is folded into a bias of each expert; the statistics of experts follow."""
    graph = traced(Decoder("transposed"), TOKENS)
    expected = run(graph, **TOKENS)["y"]
    asked = recipe(f"quantize.transform={transform}", "quantize.center=null", "quantize.smooth=0.5", *settings)
    program = with_experts(stubbed(graph, recipe=asked))
    inputs = program.measured[CALIBRATION].inputs
    before = {name: inputs[name] for name in list(inputs)}
    assert apply(program, FoldTransforms())
    assert relative(run(graph, **TOKENS)["y"], expected) < 1e-5
    transforms = {"none": aten.mul.Tensor, "hadamard": HADAMARD, "flatquant": KRONECKER}
    nodes = list(calls(graph, transforms[transform]))
    assert len(nodes) >= 2
    if settings == ("quantize.center=0.0",):
        assert len(list(calls(graph, aten.index.Tensor))) == 2
    if "quantize.center=0.0" in settings:
        return
    # What an expert gives on its own tokens has the energy that it had.
    plain = traced(Decoder(), TOKENS).module
    for product, site in zip(calls(graph, EXPERT_LINEAR), SITES, strict=True):
        (name,) = (str(node.target) for node in product.args[1].all_input_nodes)  # type: ignore[union-attr]
        for expert in range(EXPERTS):
            energies = []
            for module, held, own in ((plain, before, site.removeprefix("model.")), (graph.module, inputs, name)):
                weight, found = get_tensor(module, own)[expert].detach().double(), held[expert_site(site, expert)]
                assert found.moments is not None and found.tokens == 200
                energies.append(float((weight @ found.moments.dense().double() @ weight.T).trace()))
            assert energies[0] == pytest.approx(energies[1], rel=1e-4)


def test_clips_are_searched_through_all_experts(apply: Apply) -> None:
    graph = traced(Decoder(), TOKENS)
    program = stubbed(graph, recipe=recipe("quantize.activations.bits=4"))
    assert not apply(program, SearchClips())
    inputs, scheme = program.measured[CALIBRATION].inputs, recipe("quantize.activations.bits=4").quantize
    assert scheme is not None
    for product, site in zip(calls(graph, EXPERT_LINEAR), SITES, strict=True):
        fact, dense = stub_fact(product.args[0]), get_tensor(graph.module, site.removeprefix("model."))  # type: ignore[arg-type]
        assert fact is not None and fact.site == site
        assert fact.clip == best_clip(inputs[site], dense.detach().flatten(0, 1), scheme.activations)


def test_static_scales_follow_tokens_in_one_list(apply: Apply) -> None:
    """Text tokens of layers that flatten tokens get the scale of text."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Decoder().layers

        def forward(self, inputs_embeds: Tensor) -> Tensor:
            return self.layers[0](inputs_embeds)

    visual = torch.zeros(2, 5, dtype=torch.bool)
    visual[:, :3] = True
    feeds = {"inputs_embeds": torch.where(visual[..., None], TOKENS["x"] / 50, TOKENS["x"])}
    graph = traced(Named(), feeds)
    expected = run(graph, **feeds)["y"]
    settings = ["quantize.weights.bits=8", "quantize.activations.granularity=modality"]
    program = stubbed(graph, recipe=recipe(*settings, "quantize.activations.clip_search=false"))
    inputs = program.measured[CALIBRATION].inputs
    for site, factor in zip(SITES, (0.02, 0.001), strict=True):
        found = inputs[site]
        found.visual[:32] = False
        found.rows[found.visual] *= factor
    assert apply(program, QuantizeWeights())
    scales = [value(node.args[1]).shape for node in calls(graph, QUANTIZE_STATIC)]  # type: ignore[arg-type]
    assert [len(shape) for shape in scales] == [3, 3] and [shape[1] for shape in scales] == [1, 2]
    found = run(graph, **feeds, **{VISUAL: visual})["y"]
    assert relative(found[visual], expected[visual]) < 0.05 and relative(found[~visual], expected[~visual]) < 0.05


def test_prefill_and_decode_share_turned_weights(apply: Apply) -> None:
    module = Decoder("transposed")
    graphs = [traced(module, TOKENS, name=name) for name in (PREFILL, DECODE)]
    program = stubbed(*graphs, recipe=recipe())
    for name in ("gate_up_proj_turned", "down_proj_turned"):
        one, other = (get_tensor(graph.module, f"layers.0.experts.{name}") for graph in graphs)
        assert one.data_ptr() == other.data_ptr() and one.is_contiguous()
    assert apply(program, QuantizeWeights())
    read = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "get_attr"}
    parts = {f"{name}_turned_{part}" for name in ("gate_up_proj", "down_proj") for part in ("packed", "scale")}
    assert {name.rpartition(".")[2] for name in read if "experts" in name} == parts


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("computed", [], "the graph computes the weights of these experts"),
        ("", ["quantize.ignore=[router, shared, down_proj]"], "quantize.ignore: down_proj"),
        ("", ["quantize.scope=[vision]", "quantize.head_bits=16"], "language is not in quantize.scope"),
    ],
)
def test_what_is_left_out_is_told(kind: str, settings: list[str], reason: str) -> None:
    graph = traced(Decoder(kind), TOKENS)
    program = stubbed(graph, recipe=recipe(*settings))
    assert {item.name: item.reason for item in program.plan.left_out}[SITES[1]] == reason


def test_refusals() -> None:
    with pytest.raises(RecipeError, match=r"gate_up_proj has 8 inputs, which 5 does not divide"):
        stubbed(
            traced(Decoder(), TOKENS),
            recipe=recipe("quantize.weights.granularity=group", "quantize.weights.group_size=5"),
        )
    with pytest.raises(RecipeError, match="matches no linear"):
        stubbed(traced(Decoder(), TOKENS), recipe=recipe("quantize.ignore=[router, shared, gate_proj]"))


def test_tokens_of_an_expert_are_those_that_chose_it_and_count() -> None:
    x, choice = torch.arange(4.0).view(4, 1, 1), torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    counts = torch.tensor([True, True, True, False]).view(4, 1)
    found = {expert: rows.flatten().tolist() for expert, rows in _by_expert(x, choice, counts, 4)}
    assert found == {0: [0, 2], 1: [1, 2], 2: [0, 1]}
    slots = torch.arange(8.0).view(4, 2, 1)
    found = {expert: rows.flatten().tolist() for expert, rows in _by_expert(slots, choice, None, 3)}
    assert found[2] == [1, 2, 6]


def test_flat_tokens_are_marked_like_those_in_rows() -> None:
    class Flow:
        visual = torch.tensor([[True, False], [False, False]])
        counts = torch.tensor([[True, True], [False, True]])

    flow: Any = Flow()
    for shape in ((2, 2, 8), (4, 8), (4, 3, 8)):
        visual, counts = _marks(flow, torch.zeros(shape))
        assert visual is not None and counts is not None and visual.shape == counts.shape == shape[:-1]
        assert visual.reshape(4, -1).all(dim=1).tolist() == [True, False, False, False]
        assert counts.reshape(4, -1).any(dim=1).tolist() == [True, True, False, True]
    assert _marks(flow, torch.zeros(5, 8)) == (None, None)


def test_unrounded_activations_reach_the_experts(apply: Apply) -> None:
    """What the meter of a compile's cost runs: quantized weights, activations as they are."""
    graph = traced(Decoder(), TOKENS)
    program = stubbed(graph, recipe=recipe("quantize.activations.bits=4", "quantize.activations.clip_search=false"))
    other = stubbed(traced(Decoder(), TOKENS), recipe=recipe("quantize.activations.bits=16"))
    for each in (program, other):
        assert apply(each, QuantizeWeights())
    found = _unrounded(HERE)(program.graphs[PREFILL], dict(TOKENS))["y"]
    assert relative(found, run(other.graphs[PREFILL], **TOKENS)["y"]) < 1e-6
    assert relative(run(graph, **TOKENS)["y"], found) > 1e-3
