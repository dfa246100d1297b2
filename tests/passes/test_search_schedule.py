"""The schedule search, against each schedule compiled by the passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import captured, changed_recipe, fresh

from qpcompile.errors import PlanError
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.passes.search_schedule import SearchSchedule
from qpcompile.pruning.schedules import SCHEDULE, Shares, cut_layers_of, schedules
from qpcompile.runtime.machine import Machine, execute_graph

Apply = Callable[[Program, SearchSchedule], bool]
VISUAL = 16
"""Visual tokens of the sample "one"."""
JOINT = ("tokens.method=joint", "tokens.keep=0.5", "tokens.keep_of=mean")


def ready(*settings: str) -> Program:
    """The captured LLaVA with stubs."""
    program = fresh(changed_recipe("none", *settings))
    run_passes(program, [Canonicalize(), InsertQuantStubs(), Calibrate([], 0)])
    return program


def next_token(program: Program, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the first new token."""
    seen: list[torch.Tensor] = []

    def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = execute_graph(graph, feeds)
        if graph.name == PREFILL:
            head = program.graphs[HEAD]
            last = next(iter(results.values()))[:, -1:]
            seen.append(next(iter(head({head.inputs[0]: last}).values()))[:, 0].log_softmax(-1))
        return results

    Machine(program, execute).prefill(sample)
    return seen[0]


def cost(shares: Shares, sample: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
    """KL between `expected`, of the model with all tokens, and the model with the schedule, cut by the passes."""
    program = ready(*JOINT)
    program.measured[SCHEDULE] = shares
    PlanTokenBudget().run(program)
    assert [(cut.layer, pytest.approx(cut.ratio)) for cut in program.plan.cuts] == list(cut_layers_of(shares))
    InsertTokenCuts().run(program)
    found = next_token(program, sample)
    return float((expected.exp() * (expected - found)).sum())


def test_the_cheapest_schedule_is_found(apply: Apply) -> None:
    sample = captured()[1]["one"]
    program = ready(*JOINT)
    assert not apply(program, SearchSchedule([sample], 1))
    best = program.measured[SCHEDULE]
    tried = schedules(0.5, 3, VISUAL)
    assert best in tried
    expected = next_token(ready(), sample)
    # Each takes seconds to compile: every fourth one.
    costs = [cost(shares, sample, expected) for shares in tried[::4] if shares != best]
    assert cost(best, sample, expected) <= min(costs) * (1 + 1e-3) < 0.9 * max(costs)


def test_the_plan_has_the_mean_that_was_asked_for(apply: Apply) -> None:
    program = ready(*JOINT)
    apply(program, SearchSchedule([captured()[1]["one"]] * 8, 8))
    PlanTokenBudget().run(program)
    counts = program.plan.visual_tokens(VISUAL)
    assert sum(counts) == VISUAL * 3 // 2


def test_only_joint_pays_for_it(apply: Apply) -> None:
    program = ready("tokens.method=cdpruner", "tokens.keep=0.5")
    apply(program, SearchSchedule([captured()[1]["one"]], 1))
    assert SCHEDULE not in program.measured


def test_a_final_share_is_refused() -> None:
    with pytest.raises(PlanError, match="schedules with one mean"):
        SearchSchedule([captured()[1]["one"]], 1).run(ready("tokens.method=joint", "tokens.keep=0.5"))
