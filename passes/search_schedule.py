"""Search the score and the schedule on samples: those with which the quantized model stays closest to the full one.

    cost of a candidate = mean over samples of mean over answer tokens of KL( p || p' )

The full-precision model answers each sample; p is its distribution of each of the answer's tokens, p' that of the model
with the candidate's cuts and scores, fake-quantized at the quant stubs by the recipe and given the same answer. Prompt
and answer run through the prefill graph at once; scores see the prompt only. All candidates have the mean that the
recipe asks for (qpcompile/pruning/candidates.py): first every score at a few schedules and the single methods of the
harness, then all schedules of the best scores. In both rounds the worse half is discarded after an eighth of the
samples, half of the rest after a quarter and after a half; the best single method stays to the end.

The choice is made on every other sample, and what it costs is measured on the rest: if the best single method costs
less there, it is taken instead.

Ours: QUOTA (arXiv 2604.17320, section 3.2) instead distributes a fixed drop by each layer's own deviation. The search
is successive halving (Jamieson and Talwalkar, arXiv 1502.07943).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

from qpcompile.calibration.drop_gradients import drop_costs
from qpcompile.ir.program import HEAD, PREFILL, Program
from qpcompile.passes.trial_costs import ALL_TOKENS, TrialCosts
from qpcompile.progress import track
from qpcompile.pruning.candidates import CHOSEN, Chosen, Trial, best_scores, first_trials, second_trials
from qpcompile.pruning.fit import Fit, Weights, cue_graph
from qpcompile.pruning.methods.joint import Joint, JointOptions
from qpcompile.pruning.pruner import options_of
from qpcompile.pruning.scores import RANDOM
from qpcompile.pruning.table import PRUNERS
from qpcompile.quality.recorded import Answered, record_answers
from qpcompile.quality.verdict import FAIR
from qpcompile.quantization.fake_quant import ROUNDING, StubRounding
from qpcompile.recipe.choice import Candidate, Choice, Price, Score
from qpcompile.runtime.machine import VALID, VISUAL
from qpcompile.stages import Stage

_LOG = logging.getLogger("qpcompile")

# Samples that weights of cues are fitted on, and candidates that always stay: few samples cannot tell the best apart.
FITTED_ON, LEAST = 16, 6


@dataclass(frozen=True)
class SearchSchedule:
    """See the module's docstring. Runs for the method `joint` only."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "search_schedule"
    purpose: ClassVar[str] = (
        "Search the score and the schedule on samples: those with which the quantized model stays closest to the full "
        "one."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `program.measured[CHOSEN]` and `program.plan.choice`; the graphs are unchanged."""
        tokens = program.recipe.tokens
        if tokens.method == "none" or not isinstance(PRUNERS[tokens.method], Joint) or CHOSEN in program.measured:
            return False
        options = options_of(JointOptions, program.recipe)
        count = min(self.count, options.trial_samples)
        answers = record_answers(program, islice(self.samples, count), count, options.answer_tokens)
        rounding = program.measured.get(ROUNDING) or StubRounding.of(program)
        if ROUNDING in program.measured:
            del program.measured[ROUNDING]
        search = _Search(program, answers[::2], answers[1::2] or answers, len(answers) > 1, rounding)
        program.measured[CHOSEN], choice = search.run()
        program.plan = program.plan.changed(choice=choice)
        if choice.warning:
            _LOG.warning("%s", choice.warning)
        # Trial graphs are reference cycles: they would keep weights alive that later passes replace.
        del search, rounding
        gc.collect()
        return False


class _Search:
    """The search on recorded answers: `own` to choose on, `other` to price on."""

    def __init__(
        self, program: Program, own: list[Answered], other: list[Answered], apart: bool, rounding: StubRounding | None
    ) -> None:
        self.program, self.own, self.other, self.apart = program, own, other, apart
        self.costs = TrialCosts(program, rounding)
        visual = sorted(count for answered in own for count in answered.visual.sum(dim=1).tolist())
        self.visual = visual[len(visual) // 2]
        self.left: list[str] = []

    def run(self) -> tuple[Chosen, Choice]:
        """The candidate that is taken, and the record of the search."""
        self.costs.weights = self._fitted()
        first, self.left = first_trials(self.program, PRUNERS, self.visual)
        possible = [*first, *second_trials(self.program, self.visual, ["cdpruner"], ["text"])]
        self.costs.prepare(layer for trial in possible for layer in trial.layers)
        self._halve(first, "scores")
        before, inside = best_scores(self._ranked(first))
        second = second_trials(self.program, self.visual, before, inside)
        known = {trial.key for trial in first}
        second = [trial for trial in second if trial.key not in known]
        finished = [trial for trial in first if self.costs.seen(trial) == len(self.own)]
        self._halve([*finished, *second], "schedules")
        ranked = self._ranked([*first, *second])
        best, single = ranked[0], next(trial for trial in ranked if trial.method is not None)
        random = next(trial for trial in first if trial.method == RANDOM)
        asked = dict.fromkeys((best, single, random, ALL_TOKENS))
        priced = dict(self.program.ranks.spread(asked, lambda _: 1.0, self._price))
        taken = min((best, single), key=lambda trial: priced[trial].cost)
        names = {"chosen": taken, "best single method": single, "random": random, "all tokens": ALL_TOKENS}
        prices = tuple(priced[trial].model_copy(update={"name": name}) for name, trial in names.items())
        choice = Choice(
            samples=len(self.own),
            apart=self.apart,
            candidates=tuple(self._candidate(trial) for trial in ranked),
            prices=prices,
            left_out=tuple(self.left),
            warning=_warning(self.program, prices),
        )
        weights = self.costs.weights
        scores = tuple(Score(name=name, weights=weights.get((name, layer), ())) for layer, _, name in taken.drops)
        return Chosen(taken, scores), choice

    def _fitted(self) -> Weights:
        """Weights of the cues, on some of the samples."""
        fit, graph = Fit(self.program.recipe.tokens), cue_graph(self.program)
        head, on = self.program.graphs.get(HEAD), self.costs.on
        chosen = self.own[:FITTED_ON]

        def work(answered: Answered) -> tuple[Any, Any]:
            feeds = {**answered.feeds, VISUAL: answered.visual, VALID: answered.asked}
            cues = self.costs.run(graph, feeds)
            full = answered.full
            return cues, drop_costs(self.program.graphs[PREFILL], head, answered.feeds, full.tokens, full.counted, on)

        ranks = self.program.ranks
        with track("weights of cues", len(chosen), shown=ranks.leads) as step:
            for answered, (cues, costs) in ranks.spread(chosen, lambda _: 1.0, work):
                fit.add(cues, costs, answered.visual & answered.asked)
                step()
        return fit.weights()

    def _halve(self, trials: list[Trial], title: str) -> None:
        """Evaluate on all samples, discarding the worse half on the way; the best single method stays."""
        count = len(self.own)
        alive = trials
        with track(f"{SearchSchedule.name}, {title}", count, shown=self.program.ranks.leads) as step:
            for number, answered in enumerate(self.own):
                self.costs.add(alive, number, answered)
                if number + 1 in (count // 8, count // 4, count // 2):
                    order = sorted(alive, key=lambda trial: self.costs.mean(trial, number + 1))
                    singles = [trial for trial in order if trial.method is not None][:1]
                    best = order[: max((len(order) + 1) // 2, LEAST)]
                    alive = [*best, *(trial for trial in singles if trial not in best)]
                if number + 1 == count or self.program.checkpoint.due():
                    self.costs.save()
                step()

    def _ranked(self, trials: list[Trial]) -> list[Trial]:
        """Most samples first, then least cost; ties to the earlier candidate."""
        return sorted(trials, key=lambda trial: (-self.costs.seen(trial), self.costs.mean(trial)))

    def _price(self, trial: Trial) -> Price:
        """Its cost on the other half."""
        found = self.costs.agreement(trial, self.other)
        return Price(
            name="chosen",
            drops=trial.described(),
            answers=found.answers,
            equal_answers=found.equal_answers,
            cost=digits(found.divergence / max(found.tokens, 1)),
        )

    def _candidate(self, trial: Trial) -> Candidate:
        return Candidate(
            drops=trial.described(),
            method=trial.method,
            samples=self.costs.seen(trial),
            cost=digits(self.costs.mean(trial)),
        )


def digits(number: float) -> float:
    """Four significant digits: the others depend on the order of sums."""
    return float(f"{max(number, 0.0):.4g}")


def _warning(program: Program, prices: tuple[Price, ...]) -> str | None:
    """What is said loudly: no candidate at this mean stays above the asked quality."""
    least = program.recipe.quality.min_agreement or FAIR
    chosen, whole = prices[0], prices[-1]
    if chosen.equal_answers >= least * whole.equal_answers:
        return None
    return (
        f"no score and schedule with a mean of {program.recipe.tokens.keep:g} of the visual tokens keeps {least:.0%} "
        f"of the answers: of {whole.answers}, {whole.equal_answers} equal full precision's with all tokens and "
        f"{chosen.equal_answers} with the best one. Raise tokens.keep: a model that reads its picture late must not be "
        "cut early"
    )
