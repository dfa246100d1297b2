"""Searched clip ratios: minimal output error, for both kinds of tokens, only if the recipe asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from programs import changed_recipe, stubbed
from toy_decoder import decode_graph, prefill_graph

from qpcompile.calibration.statistics import InputStatistics
from qpcompile.ir.edit import calls
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import QUANT_STUB, QUANTIZE_DYNAMIC
from qpcompile.ir.program import DECODE, PREFILL, Program
from qpcompile.passes.quantize_weights import QuantizeWeights
from qpcompile.passes.search_clips import RATIOS, SearchClips, best_clip
from qpcompile.quantization.fake_quant import round_trip
from qpcompile.recipe.quantize import ActivationScheme

Apply = Callable[[Program, SearchClips], bool]


def ready(*settings: str) -> Program:
    recipe = changed_recipe("w4a4kv4", "quantize.ignore=[]", *settings)
    return stubbed(prefill_graph(gated=True), decode_graph(gated=True), recipe=recipe, layers=2)


def clips(program: Program, graph: str) -> dict[str, float | None]:
    facts = [stub_fact(stub) for stub in calls(program.graphs[graph], QUANT_STUB)]
    return {fact.site: fact.clip for fact in facts if fact is not None and fact.role == "activation"}


def statistics(rows: torch.Tensor, visual: torch.Tensor | None = None) -> InputStatistics:
    made = InputStatistics.empty(rows.shape[1], moments=False)
    made.add(rows, visual=visual)
    return made


def noise(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def test_every_site_gets_one_in_both_graphs(apply: Apply) -> None:
    program = ready("quantize.activations.clip_search=true")
    assert not apply(program, SearchClips())
    found = clips(program, PREFILL)
    assert found == clips(program, DECODE)
    assert all(clip in RATIOS for clip in found.values()) and any(clip != 1.0 for clip in found.values())
    QuantizeWeights().run(program)
    nodes = list(calls(program.graphs[PREFILL], QUANTIZE_DYNAMIC))
    assert {float(node.args[2]) for node in nodes} == set(found.values())  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_is_the_best_of_all_ratios(bits: Literal[4, 8]) -> None:
    rows, weights = noise(100, 32), noise(5, 32, seed=1)
    best = best_clip(statistics(rows), weights, ActivationScheme(bits=bits))
    costs = {ratio: float(((round_trip(rows, 0, ratio, bits) - rows) @ weights.T).pow(2).sum()) for ratio in RATIOS}
    assert costs[best] == pytest.approx(min(costs.values()), rel=1e-5)
    # 8 bits lose less by their steps than by a clip.
    assert (best < 1.0) == (bits == 4)


def test_values_on_the_grid_are_not_clipped() -> None:
    rows = torch.tensor([[7.0, 3.0, -2.0, 1.0]]).repeat(10, 1)
    assert best_clip(statistics(rows), torch.eye(4), ActivationScheme()) == 1.0


def test_few_text_tokens_count_as_much_as_many_visual_ones() -> None:
    exact = torch.tensor([[7.0, 3.0, -2.0, 1.0]])
    rows = torch.cat([noise(200, 4), 30 * exact])
    visual = torch.arange(201) < 200
    assert best_clip(statistics(rows, visual), torch.eye(4), ActivationScheme()) == 1.0


@pytest.mark.parametrize("settings", [(), ("quantize.activations.clip_search=false",)])
def test_nothing_to_do(apply: Apply, settings: tuple[str, ...]) -> None:
    program = ready("quantize.activations.clip_search=false", *settings)
    assert not apply(program, SearchClips())
    assert set(clips(program, PREFILL).values()) == {None}
