"""The search for score and schedule: its costs against compiled candidates, and models whose right choice is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import HERE, captured, changed_recipe, fresh

from qpcompile.calibration.drop_gradients import drop_costs
from qpcompile.errors import OutputError, RecipeError
from qpcompile.ir import checkpoint as checkpoints
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.edit import get_tensor, set_tensor
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import DECODE, HEAD, PREFILL, Program
from qpcompile.passes.calibrate import Calibrate
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.passes.insert_quant_stubs import InsertQuantStubs
from qpcompile.passes.insert_token_cuts import InsertTokenCuts
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.passes.search_schedule import SearchSchedule, _Search
from qpcompile.passes.trial_costs import ALL_TOKENS, TrialCosts
from qpcompile.pruning.candidates import CHOSEN, IN_DECODER, Chosen, Trial
from qpcompile.pruning.table import check_method
from qpcompile.quality.answers import answer_of, compare
from qpcompile.quality.recorded import Answered, record_answers
from qpcompile.recipe.choice import Score
from qpcompile.runtime.machine import Machine

Apply = Callable[[Program, SearchSchedule], bool]
VISUAL = 16
"""Visual tokens of the sample "one"."""
JOINT = (
    "tokens.method=joint",
    "tokens.keep=0.5",
    "tokens.keep_of=mean",
    "tokens.compact_scored_layer=false",
    "tokens.options.answer_tokens=3",
)
WEIGHTS = (1.0, -0.5, 0.25, 0.75)


def ready(*settings: str, reads: int | None = None) -> Program:
    """The captured LLaVA with stubs; only one of its three layers reads other tokens if `reads` says which."""
    program = fresh(changed_recipe("none", *settings))
    run_passes(program, [Canonicalize(), InsertQuantStubs(), Calibrate([], 0)])
    for graph in (program.graphs[PREFILL], program.graphs[DECODE]):
        for name in {str(node.target) for node in graph.nodes if node.op == "get_attr"}:
            if reads is not None and "o_proj" in name and f"layers.{reads}." not in name:
                set_tensor(graph.module, name, torch.zeros_like(get_tensor(graph.module, name)))
    return program


def samples(*names: str) -> list[dict[str, torch.Tensor]]:
    return [captured()[1][name] for name in names]


@pytest.mark.parametrize(
    "drops",
    [
        ((-1, 0.5, "cdpruner (minus)"),),
        ((0, 0.25, "text (raters)"),),
        ((-1, 0.75, "trim"), (1, 0.25, "text (last)")),
        ((0, 0.5, "fitted"), (1, 0.0, "quota (minus magnitude)")),
    ],
    ids=lambda drops: "; ".join(name for *_, name in drops),
)
def test_a_cost_is_that_of_the_compiled_candidate(drops: tuple[tuple[int, float, str], ...]) -> None:
    """Prompt and answer at once, with scores of the prompt alone, against an answer step by step."""
    trial, program = Trial(drops), ready(*JOINT)
    (answered,) = record_answers(program, samples("longer"), 1, 3)
    costs = TrialCosts(program, None)
    costs.weights = {("fitted", 0): WEIGHTS}
    found = costs.agreement(trial, [answered])
    cut = ready(*JOINT, "tokens.keep=0.9")
    scores = tuple(Score(name=name, weights=costs.weights.get((name, layer), ())) for layer, _, name in drops)
    cut.measured[CHOSEN] = Chosen(trial, scores)
    run_passes(cut, [PlanTokenBudget(), InsertTokenCuts()])
    assert [(each.layer, each.score) for each in cut.plan.cuts] == [
        (layer, score) for (layer, *_), score in zip(drops, scores, strict=True)
    ]
    with Machine(cut) as machine:
        expected = compare(machine, samples("longer")[0], answered.full)
    assert found.tokens == expected.tokens > 1 and found.equal_tokens == expected.equal_tokens
    assert found.divergence == pytest.approx(expected.divergence, rel=1e-3, abs=1e-6) and found.divergence > 0
    assert costs.agreement(ALL_TOKENS, [answered]).divergence < 1e-6


def test_the_cheapest_candidate_is_taken(apply: Apply) -> None:
    program = ready(*JOINT)
    assert not apply(program, SearchSchedule(samples("one", "longer", "one", "longer"), 4))
    choice, taken = program.plan.choice, program.measured[CHOSEN]
    assert choice is not None and choice.samples == 2 and choice.apart
    finished = [each for each in choice.candidates if each.samples == 2]
    assert finished == sorted(finished, key=lambda each: each.cost) and len(finished) < len(choice.candidates)
    chosen, single, random, whole = choice.prices
    assert [price.name for price in choice.prices] == ["chosen", "best single method", "random", "all tokens"]
    assert chosen.drops == taken.trial.described() and chosen.cost <= single.cost and whole.cost < 1e-6
    assert chosen.drops in (finished[0].drops, single.drops) and random.drops[0].score == "random_input"
    tried = {drop.score for each in choice.candidates for drop in each.drops}
    assert {"cdpruner (minus)", "divprune", "quota (minus magnitude)", "residual", "fitted (last)"} <= tried
    methods = {each.method for each in choice.candidates}
    assert {"cdpruner", "divprune", "qapruner", "trim", "random_input"} <= methods
    # FastV, for example, runs two layers of three on all tokens, more than half.
    assert all(name in methods or any(why.startswith(f"{name}: ") for why in choice.left_out) for name in IN_DECODER)
    PlanTokenBudget().run(program)
    assert sum(program.plan.visual_tokens(VISUAL)) <= VISUAL * 3 // 2
    again = ready(*JOINT)
    SearchSchedule(samples("one", "longer", "one", "longer"), 4).run(again)
    assert again.plan.choice == choice


def test_a_picture_that_is_read_first_is_whole_there() -> None:
    program = ready(*JOINT, reads=0)
    SearchSchedule(samples("one", "longer"), 2).run(program)
    assert program.plan.choice is not None and program.plan.choice.warning is None
    assert program.measured[CHOSEN].trial.layers[0] >= 0 and program.plan.choice.prices[0].cost < 1e-6


def test_a_picture_that_is_read_last_is_not_cut_first() -> None:
    """The flat schedule keeps most tokens in the last layer; a step that leaves few there measures worse."""
    program = ready(*JOINT, reads=2)
    SearchSchedule(samples("one", "longer", "one", "longer"), 4).run(program)
    PlanTokenBudget().run(program)
    assert program.plan.visual_tokens(VISUAL)[2] >= VISUAL * 3 // 8


def with_large_background(program: Program) -> tuple[Answered, torch.Tensor]:
    """A sample whose visual tokens that matter least are scaled up, answered again, and their costs after layer 0."""
    (answered,) = record_answers(program, samples("one"), 1, 3)
    head, feeds = program.graphs[HEAD], dict(answered.feeds)
    asked = (feeds, answered.full.tokens, answered.full.counted, HERE)
    costs = drop_costs(program.graphs[PREFILL], head, *asked)[0]
    places = answered.visual[0].nonzero()[:, 0]
    background = places[costs[0, places].abs().argsort()[: len(places) // 2]]
    embeddings = feeds["inputs_embeds"].clone()
    embeddings[0, background] *= 20
    feeds["inputs_embeds"] = embeddings
    hidden = next(iter(program.graphs[PREFILL](feeds).values()))[:, -answered.full.tokens.shape[1] :]
    logits = head({head.inputs[0]: hidden})[head.outputs[0]]
    full = answer_of(logits.argmax(-1), answered.full.counted, logits)
    return Answered(full, feeds, answered.visual, answered.valid, answered.asked), background


@torch.no_grad()
def test_large_norms_that_mark_background_are_not_kept() -> None:
    program = ready(*JOINT, reads=1)
    # Queries of that layer look at few tokens.
    for graph in (program.graphs[PREFILL], program.graphs[DECODE]):
        for name in {str(node.target) for node in graph.nodes if node.op == "get_attr"}:
            if "layers.1." in name and "q_proj.weight" in name:
                set_tensor(graph.module, name, get_tensor(graph.module, name) * 30)
    altered, background = with_large_background(program)
    search = _Search(program, [altered], [altered], False, None)
    chosen, choice = search.run()
    plus, minus = (
        search.costs.agreement(Trial(((0, 0.5, name),)), [altered]) for name in ("magnitude", "magnitude (minus)")
    )
    assert plus.divergence > 2 * minus.divergence
    assert all(score != "magnitude" for *_, score in chosen.trial.drops)
    assert search.costs.weights["fitted", 0][1] < 0
    assert choice.prices[0].cost <= 1.001 * minus.divergence / minus.tokens and len(background) == VISUAL // 2


def test_only_joint_pays_for_it(apply: Apply) -> None:
    program = ready("tokens.method=cdpruner", "tokens.keep=0.5")
    apply(program, SearchSchedule(samples("one"), 1))
    assert CHOSEN not in program.measured and program.plan.choice is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tokens.keep_of=final", "schedules with one mean"),
        ("tokens.compact_scored_layer=true", "also in the layers that score"),
    ],
)
def test_what_is_not_measured_is_refused(setting: str, message: str) -> None:
    check_method(changed_recipe("none", *JOINT))
    with pytest.raises(RecipeError, match=message):
        check_method(changed_recipe("none", *JOINT, setting))


def test_a_stopped_search_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", -1.0)
    evaluated: list[str] = []
    own, limit = TrialCosts.agreement, -1

    def stopping(self: TrialCosts, trial: Trial, given: Any) -> Any:
        evaluated.append(trial.key)
        if len(evaluated) == limit:
            raise KeyboardInterrupt
        return own(self, trial, given)

    monkeypatch.setattr(TrialCosts, "agreement", stopping)
    whole = ready(*JOINT)
    search = SearchSchedule(samples("one", "longer", "one"), 3)
    search.run(whole)
    uninterrupted = len(evaluated)
    evaluated.clear()
    limit = uninterrupted - 8
    stopped = ready(*JOINT)
    stopped.checkpoint = Checkpoint.open(tmp_path / "progress", "key")
    with pytest.raises(KeyboardInterrupt):
        search.run(stopped)
    evaluated.clear()
    limit = -1
    resumed = ready(*JOINT)
    resumed.checkpoint = Checkpoint.open(tmp_path / "progress", "key")
    search.run(resumed)
    assert resumed.plan.choice == whole.plan.choice and len(evaluated) < uninterrupted
    damaged = Checkpoint.open(tmp_path / "progress", "key")
    damaged.save("search_schedule", {}, {"costs": {"text 0 0.5": [-1.0]}})
    broken = ready(*JOINT)
    broken.checkpoint = copy.copy(damaged)
    with pytest.raises(OutputError, match="a cost is not a number"):
        search.run(broken)
