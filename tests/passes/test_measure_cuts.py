"""Costs of single cuts against the same cuts made by the pass that makes them for good."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import captured, changed_recipe, fresh

from qpcompile.errors import PlanError
from qpcompile.ir.cut_costs import CutCosts
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.ir.run import Machine, execute_graph
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.measure_cuts import MeasureCuts
from qpcompile.plan import Cut

Apply = Callable[[Program, MeasureCuts], bool]
JOINT = ("tokens.method=joint", "tokens.keep=0.5", "tokens.keep_of=mean")


def ready(recipe: str, *settings: str) -> Program:
    """The captured LLaVA, marked."""
    program = fresh(changed_recipe(recipe, *settings))
    run_passes(program, [Canonicalize(), InsertQuantStubs(), Calibrate([], 0)])
    return program


def next_token(program: Program, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the first new token."""
    seen: list[torch.Tensor] = []

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = execute_graph(graph, feeds)
        if graph.name == PREFILL:
            last = next(iter(results.values()))[:, -1:]
            head = program.graphs[HEAD]
            seen.append(next(iter(head({head.inputs[0]: last}).values()))[:, 0].log_softmax(-1))
        return results

    Machine(program, execute).prefill(sample)
    return seen[0]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_cost_is_the_divergence_of_that_cut(apply: Apply, layer: int) -> None:
    _, cases, _ = captured()
    sample = cases["one"]
    program = ready("none", *JOINT, "tokens.cost_levels=[0.1, 0.4]")
    assert not apply(program, MeasureCuts([sample], 1))
    costs: CutCosts = program.facts["cut_costs"]
    assert costs.costs.shape == (3, 2) and costs.base == pytest.approx(0, abs=1e-6)

    cut = ready("none", *JOINT)
    cut.plan = cut.plan.changed(cuts=(Cut(layer=layer - 1, ratio=0.4, numerator=400_000, denominator=1_000_000),))
    cut.stage = "planned"
    InsertTokenCuts().run(cut)
    expected, found = next_token(ready("none"), sample), next_token(cut, sample)
    divergence = float((expected.exp() * (expected - found)).sum())
    assert divergence > 1e-5
    assert costs.costs[layer, 1] == pytest.approx(divergence, rel=1e-3)


def test_costs_are_those_of_the_quantized_model(apply: Apply) -> None:
    _, cases, _ = captured()
    program = ready("w4a4kv4", *JOINT, "tokens.cost_levels=[0.5]")
    apply(program, MeasureCuts([cases["one"]], 1))
    assert program.facts["cut_costs"].base > 1e-4


def test_costs_are_means_over_the_first_samples(apply: Apply) -> None:
    _, cases, _ = captured()
    samples = [cases["one"], cases["two_pictures"] if "two_pictures" in cases else cases["one"]]
    singles = []
    for sample in samples:
        program = ready("none", *JOINT, "tokens.cost_levels=[0.2]")
        apply(program, MeasureCuts([sample], 1))
        singles.append(program.facts["cut_costs"].costs)
    both = ready("none", *JOINT, "tokens.cost_levels=[0.2]", "tokens.cost_samples=2")
    apply(both, MeasureCuts([*samples, samples[0]], 3))
    assert both.facts["cut_costs"].costs == pytest.approx((singles[0] + singles[1]) / 2, rel=1e-6)


def test_only_joint_pays_for_it(apply: Apply) -> None:
    program = ready("prune-30")
    apply(program, MeasureCuts([captured()[1]["one"]], 1))
    assert "cut_costs" not in program.facts


def test_a_final_share_is_refused() -> None:
    with pytest.raises(PlanError, match="joint solves for a mean"):
        MeasureCuts([captured()[1]["one"]], 1).run(ready("none", "tokens.method=joint", "tokens.keep=0.5"))
