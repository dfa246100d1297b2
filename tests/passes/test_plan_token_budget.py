"""The pruning part of a plan, from measured numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from programs import changed_recipe, program_of

from qpcompile.errors import PlanError
from qpcompile.ir.program import Program
from qpcompile.passes.plan_token_budget import PlanTokenBudget
from qpcompile.pruning.budget import DEVIATIONS
from qpcompile.pruning.methods import quota
from qpcompile.recipe.plan import LayerFacts, Plan

Apply = Callable[[Program, PlanTokenBudget], bool]


def measured(*settings: str, layers: int = 6) -> Program:
    """A program with measured layers: mass rises until layer 2, sensitivity decreases with depth."""
    program = program_of(recipe=changed_recipe("prune-30", *settings), stage="calibrated", layers=layers)
    masses = [0.05, 0.3, 0.7, 0.6, 0.55, 0.5, 0.5, 0.5][:layers]
    cosines = [0.4, 0.4, 0.2, 0.21, 0.22, 0.5, 0.5, 0.5][:layers]
    facts = zip(range(layers), masses, cosines, strict=True)
    program.plan = program.plan.changed(
        facts=tuple(LayerFacts(layer=i, mass_median=mass, mass_iqr=0.01, cosine=cosine) for i, mass, cosine in facts)
    )
    program.measured[DEVIATIONS] = {layer: [0.9 - 0.1 * layer, 0.5, 0.8 - 0.1 * layer] for layer in range(layers)}
    return program


@pytest.fixture(autouse=True)
def _every_layer_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-made graphs have no attention in their layers."""
    monkeypatch.setattr(quota, "attention_layers", lambda graph: set(range(8)))


def test_golden(apply: Apply) -> None:
    program = measured("tokens.candidate_layers=[1, 3]", "tokens.keep=0.4")
    assert not apply(program, PlanTokenBudget())
    assert program.plan.candidate_layers == (1, 3)
    assert [(entry.layer, round(entry.raw, 9)) for entry in program.plan.sensitivity] == [(1, 0.7), (3, 0.5)]
    first, last = program.plan.cuts
    # The more sensitive layer clips to 0.9, the other to 0.1: shares exp(0.1 / 1.25) and exp(0.9 / 1.25), 0.345 of 1.
    assert (first.layer, first.numerator, first.denominator) == (1, 792_852, 1_000_000)
    assert (last.layer, last.ratio, last.numerator) == (3, 0.4, 400_000)
    assert program.plan.visual_tokens(100) == (100, 100, 80, 80, 40, 40)
    assert program.plan == Plan.from_dict(program.plan.to_dict())


def test_auto_takes_the_run_of_concentrated_layers(apply: Apply) -> None:
    program = measured()
    apply(program, PlanTokenBudget())
    assert program.plan.candidate_layers == (2, 3)
    assert [cut.layer for cut in program.plan.cuts] == [2, 3]
    assert program.plan.cuts[-1].numerator == 300_000


def test_auto_never_takes_the_last_layer(apply: Apply) -> None:
    program = measured("tokens.tail_fraction=0.0", "tokens.cosine_ceiling=1.0", layers=4)
    apply(program, PlanTokenBudget())
    assert program.plan.candidate_layers == (2,)


def test_conditions_that_no_layer_meets_are_waived_and_told(apply: Apply, caplog: pytest.LogCaptureFixture) -> None:
    program = measured("tokens.concentration_floor=1.0", "tokens.iqr_ceiling=0.0")
    apply(program, PlanTokenBudget())
    assert program.plan.cuts and program.plan.candidate_layers
    (waived,) = program.plan.waived
    assert waived.startswith("iqr_ceiling (range above 0.0 x mass) excluded layers [") and waived in caplog.text


@pytest.mark.parametrize("settings", [["tokens.method=none", "tokens.keep=1.0"], ["tokens.keep=1.0"]])
def test_nothing_to_do(apply: Apply, settings: list[str]) -> None:
    program = measured(*settings)
    assert not apply(program, PlanTokenBudget())
    assert program.plan.cuts == ()


def test_without_samples_all_layers_weigh_the_same(apply: Apply) -> None:
    program = measured("tokens.candidate_layers=[0, 1, 2]", "tokens.keep=0.4")
    del program.measured[DEVIATIONS]
    apply(program, PlanTokenBudget())
    assert [round(cut.ratio, 6) for cut in program.plan.cuts] == [0.8, 0.6, 0.4]


@pytest.mark.parametrize("mean", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("settings", [["tokens.candidate_layers=[0, 1]"], ["tokens.method=random_input"]])
def test_keep_may_mean_the_mean(apply: Apply, settings: list[str], mean: float) -> None:
    program = measured(*settings, f"tokens.keep={mean}", "tokens.keep_of=mean")
    apply(program, PlanTokenBudget())
    counts = program.plan.visual_tokens(100_000)
    assert sum(counts) / len(counts) == pytest.approx(100_000 * mean, rel=1e-4)


def test_a_cut_before_the_decoder_counts_in_every_layer(apply: Apply) -> None:
    program = measured("tokens.method=random_input", "tokens.keep=0.25")
    apply(program, PlanTokenBudget())
    assert [cut.layer for cut in program.plan.cuts] == [-1]
    assert program.plan.visual_tokens(100) == (25,) * 6


@pytest.mark.parametrize(
    ("settings", "message", "where"),
    [
        (["tokens.candidate_layers=[2, 5]"], "tokens cannot be cut after layer 5", "tokens.candidate_layers"),
        (["tokens.candidate_layers=[2, 9]"], "tokens cannot be cut after layer 9", "tokens.candidate_layers"),
        (
            ["tokens.candidate_layers=[2]", "tokens.keep=0.3", "tokens.keep_of=mean"],
            r"computes at least 0.5\d* of the visual tokens, 0.3 was asked",
            "tokens.keep",
        ),
        (["tokens.tail_fraction=0.99"], "no decoder layer is left", None),
    ],
)
def test_refusals(settings: list[str], message: str, where: str | None) -> None:
    with pytest.raises(PlanError, match=message) as error:
        PlanTokenBudget().run(measured(*settings))
    assert error.value.do and (where is None or error.value.where == where)
