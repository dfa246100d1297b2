"""Agreement with full precision: sums against generation by hand, causes, words, and the demand for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import qpcompile
from qpcompile.capture.samples import Samples
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import CalibrationError, QualityError, RecipeError
from qpcompile.ir.program import HEAD, Graph
from qpcompile.pipeline import meter
from qpcompile.quality.answers import Agreement, answer, compare, free_answer
from qpcompile.quality.raising import next_step
from qpcompile.quality.verdict import increments, interval, verdict
from qpcompile.recipe.plan import Loss, Plan, Quality
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import Machine, execute_graph
from tests.families import PAD, llava

ROUGH = ("tokens.candidate_layers=[0,1]", "quantize.weights.solver=rtn", "quantize.transform=hadamard")


def recipe(*overrides: str) -> Recipe:
    return Recipe.load("quota-30").with_overrides([*ROUGH, *overrides])


@pytest.fixture(scope="module")
def model() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A random model, and three samples: calibration sees one of them."""
    made, cases = llava()
    return made, [cases["one"], cases["longer"], cases["padded"]]


@pytest.fixture(scope="module")
def compiled(model: tuple[Any, list[dict[str, torch.Tensor]]]) -> CompiledVLM:
    made, samples = model
    return qpcompile.compile(made, recipe("calibration.samples=1"), calibration=iter(samples))


def test_sums_are_those_of_generation(compiled: CompiledVLM, model: tuple[Any, list[dict[str, torch.Tensor]]]) -> None:
    made, (_, *others) = model
    quality = compiled.plan.quality
    assert quality is not None and quality.apart and quality.samples == sum(len(each["input_ids"]) for each in others)
    equal = 0
    for sample in others:
        answers = [each.generate(**sample, max_new_tokens=16, do_sample=False).T for each in (made, compiled)]
        full, ours = pad_sequence(answers, batch_first=True, padding_value=PAD)
        equal += int((full == ours).all(dim=0).sum())
    assert quality.equal_answers == equal
    assert [loss.cause for loss in quality.losses] == ["token cuts", "weights", "activations", "cache"]
    assert quality.losses[-1].divergence == quality.divergence > 0


@pytest.mark.parametrize("inputs", [{"pixel_values": torch.ones(1, 2)}, {"input_ids": torch.ones(1, 9).long()}])
def test_an_answer_is_what_has_logits(inputs: dict[str, torch.Tensor]) -> None:
    """A model with an encoder returns its decoder's first token and the answer; its prompt has another length."""
    found = SimpleNamespace(sequences=torch.tensor([[7, 1, 2, 3]]), logits=[torch.ones(1, 5)] * 3)
    host = SimpleNamespace(generation_config=SimpleNamespace())
    machine: Any = SimpleNamespace(host=host, generate=lambda **_: found)
    assert free_answer(machine, inputs, 3).tolist() == [[1, 2, 3]]


def test_a_model_agrees_with_itself(compiled: CompiledVLM, model: tuple[Any, list[dict[str, torch.Tensor]]]) -> None:
    for sample in model[1]:
        own = answer(compiled.machine, sample, 5)
        found = compare(compiled.machine, sample, own)
        assert found.equal_answers == found.answers and found.equal_tokens == found.tokens > 0
        assert abs(found.divergence) < 1e-5
        assert torch.equal(free_answer(compiled.machine, sample, 5), own.tokens)


def test_divergence_is_that_of_the_distributions(
    compiled: CompiledVLM, model: tuple[Any, list[dict[str, torch.Tensor]]]
) -> None:
    """Logits that are shifted by hand: the divergence of the likeliest tokens and of the rest as one."""
    sample, logs = model[1][0], list[torch.Tensor]()

    def shifted(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = execute_graph(graph, feeds)
        if graph.name == HEAD:
            ((name, value),) = results.items()
            results = {name: value + torch.linspace(0, 1, value.shape[-1])}
            logs.extend(each[0, -1].double().log_softmax(-1) for each in (value, results[name]))
        return results

    with Machine(compiled.program) as machine:
        full = answer(machine, sample, 1)
        machine.execute = shifted
        found = compare(machine, sample, full)
    p, q = logs
    kept = full.likeliest[0, 0]
    ours, theirs = (
        torch.cat([each[kept], (1 - each[kept].exp().sum()).clamp(min=1e-7).log()[None]]) for each in (p, q)
    )
    assert found.divergence == pytest.approx(float((ours.exp() * (ours - theirs)).sum()), rel=1e-3)
    assert 0 < found.divergence <= float((p.exp() * (p - q)).sum()) * 1.001


@pytest.mark.parametrize(
    ("overrides", "measures"),
    [((), True), (("quality.samples=0",), False), (("quantize=null", "tokens.method=none", "tokens.keep=1"), False)],
)
def test_what_changes_nothing_is_not_measured(overrides: tuple[str, ...], measures: bool) -> None:
    samples = Samples([{}] * 7, None, 7, 0)
    made = meter(samples, None, Recipe.load("w4a16").with_overrides(overrides))
    assert (made is not None) == measures
    assert made is None or (made.count, made.apart) == (2, False)


@pytest.mark.slow
def test_the_compile_raises_what_it_may(model: tuple[Any, list[dict[str, torch.Tensor]]]) -> None:
    """Nothing but the cuts is lossy here: the share grows step by step until no answer differs."""
    made, samples = model
    asked = recipe("quantize=null", "tokens.weights.residual=0", "tokens.weights.inter=0.683", "tokens.keep=0.6")
    asked = asked.with_overrides(["quality.min_agreement=1.0", "quality.max_keep=1.0", "calibration.samples=1"])
    plan = qpcompile.compile(made, asked, calibration=iter(samples)).plan
    assert plan.quality is not None and plan.quality.agreement == 1 and plan.quality.apart
    assert [loss.cause for loss in plan.quality.losses] == (["token cuts"] if plan.cuts else [])
    assert [each.partition("=")[0] for each in plan.quality.raised] == ["tokens.keep"] * len(plan.quality.raised)
    assert plan.recipe.tokens.keep > asked.tokens.keep
    assert plan.quality.raised[-1] == f"tokens.keep={plan.recipe.tokens.keep:g}"


@pytest.mark.slow
def test_too_little_agreement_fails(model: tuple[Any, list[dict[str, torch.Tensor]]]) -> None:
    made, samples = model
    with pytest.raises(QualityError, match="are demanded") as caught:
        qpcompile.compile(made, recipe("quality.min_agreement=1.0"), calibration=samples)
    assert "quality.max_" in str(caught.value) and "nats per token" in str(caught.value)


def plan(asked: Recipe, equal: int, *losses: tuple[str, float]) -> Plan:
    """A plan whose 10 answers are `equal` to full precision's."""
    parts = tuple(Loss(cause=cause, equal_answers=equal, divergence=total) for cause, total in losses)
    last = parts[-1].divergence if parts else 0.0
    quality = Quality(
        samples=10, apart=True, equal_answers=equal, tokens=50, equal_tokens=45, divergence=last, losses=parts
    )
    return Plan(recipe=asked, quality=quality)


def test_the_largest_loss_is_raised_first() -> None:
    asked = recipe("quality.min_agreement=0.9", "quality.max_keep=0.4", "quality.max_cache_bits=16")
    lost = ("token cuts", 0.3), ("weights", 0.3), ("activations", 0.35), ("cache", 0.75)
    step = next_step(plan(asked, 8, *lost))
    assert step is not None and step.override == "quantize.kv_cache.bits=8"
    assert step.recipe.quantize is not None and step.recipe.quantize.kv_cache.bits == 8
    # The cache has its ceiling already: the next largest loss is raised, up to its own.
    done = asked.with_overrides(["quantize.kv_cache.bits=16"])
    step = next_step(plan(done, 8, *lost[:3]))
    assert step is not None and step.override == "tokens.keep=0.4"
    assert next_step(plan(asked, 9, *lost)) is None
    with pytest.raises(QualityError, match="80% of the answers") as caught:
        next_step(plan(done.with_overrides(["tokens.keep=0.4"]), 8, *lost[:3]))
    assert "tokens.keep=0.56" in str(caught.value)


def test_words_of_a_verdict() -> None:
    quality = plan(recipe(), 9, ("token cuts", 0.01), ("weights", 0.04), ("activations", 0.03)).quality
    assert quality is not None
    assert verdict(quality) == (
        "fair: 9 of 10 answers equal full precision's (90%; 95 % interval 60% to 98%), 0.03 nats per token; "
        "most is lost to weights (on samples that calibration did not see)"
    )
    causes, added = zip(*increments(quality), strict=True)
    assert causes == ("token cuts", "weights", "activations") and added == pytest.approx((0.01, 0.03, -0.01))
    assert interval(10, 10)[1] == 1 and interval(0, 10)[0] == 0


def test_sums_add_up() -> None:
    assert Agreement(1, 1, 5, 5, 0.5) + Agreement(2, 1, 6, 3, 0.25) == Agreement(3, 2, 11, 8, 0.75)


@pytest.mark.parametrize("overrides", [("quality.max_keep=0.5",), ("quality.min_agreement=0.9", "quality.samples=0")])
def test_demands_that_contradict_each_other_are_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="quality"):
        recipe(*overrides)


def test_a_demand_needs_samples() -> None:
    with pytest.raises(CalibrationError, match="agreement is demanded"):
        meter(None, None, Recipe.load("w4a16").with_overrides(["quality.min_agreement=0.9"]))


def test_mean_bits_are_raised_before_the_bits_of_all_sites() -> None:
    ceilings = "quality.min_agreement=0.9", "quality.max_mean_bits=5.5", "quality.max_activation_bits=8"
    lost = ("weights", 0.1), ("activations", 0.5)
    asked, overrides = recipe(*ceilings, "tokens.method=none", "tokens.keep=1"), list[str]()
    while True:
        try:
            step = next_step(plan(asked, 8, *lost))
        except QualityError as error:
            assert "max_mean_bits" in str(error)
            break
        assert step is not None
        overrides.append(step.override.removeprefix("quantize.mean_bits."))
        asked = step.recipe
    raised = ["activations=5", "activations=5.5", "activations=8", "weights=4.5", "weights=5", "weights=5.5"]
    assert overrides == raised


def test_all_sites_are_raised_without_a_mean() -> None:
    asked = recipe("quality.min_agreement=0.9", "quality.max_activation_bits=8")
    step = next_step(plan(asked, 8, ("weights", 0.1), ("activations", 0.5)))
    assert step is not None and step.override == "quantize.activations.bits=8"
