"""Candidates of the search for a score and a schedule, and the order in which they are tried.

first    every score at a few schedules, and every single method with its own schedule; where the mean does not let the
         first layer see all tokens, scores inside the decoder are tried after a cut before it
second   the best scores with all schedules: cuts inside the decoder, before it, and both
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qpcompile.errors import PlanError
from qpcompile.ir.measurements import Measurement
from qpcompile.ir.program import PREFILL, Program
from qpcompile.pruning.mean import final_keep
from qpcompile.pruning.pruner import INPUT, Pruner, attention_layers
from qpcompile.pruning.schedules import HEADS, Shares, drops_of, flat, steps, two_steps
from qpcompile.pruning.scores import BEFORE, INSIDE, RANDOM
from qpcompile.recipe.choice import Drop, Score

# Single methods of the harness that cut inside the decoder, and their scores. Those before it are flat.
IN_DECODER = {"quota": "quota", "fastv": "text (last)", "sparsevlm": "text (raters)"}
# What is not a candidate, and why.
LEFT_OUT: tuple[str, ...] = (
    "visionzip, prumerge_plus: they read the vision tower",
    "pyramiddrop: it cuts inside a layer",
    "dart: it selects by the keys of one layer only",
)
# The score of a cut before the decoder while scores inside it are compared.
AHEAD = "cdpruner"
# How many scores of each kind are combined with all schedules.
BEST_BEFORE, BEST_INSIDE = 2, 2


@dataclass(frozen=True)
class Trial:
    """A candidate: its cuts, (layer, share that stays, score), and the single method that it is."""

    drops: tuple[tuple[int, float, str], ...]
    method: str | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers after which it cuts."""
        return tuple(layer for layer, _, _ in self.drops)

    @property
    def key(self) -> str:
        """Its cuts as text; equal cuts are one candidate."""
        return "; ".join(f"{score} {layer} {ratio!r}" for layer, ratio, score in self.drops)

    def described(self) -> tuple[Drop, ...]:
        """Its cuts for the plan."""
        return tuple(Drop(layer=layer, ratio=ratio, score=score) for layer, ratio, score in self.drops)


@dataclass(frozen=True)
class Chosen:
    """The trial that was taken, and the score of each of its cuts."""

    trial: Trial
    scores: tuple[Score, ...]


CHOSEN: Measurement[Chosen] = Measurement("chosen")


def first_trials(program: Program, methods: dict[str, Pruner], visual: int) -> tuple[list[Trial], list[str]]:
    """The first round, for prompts with `visual` visual tokens; and the single methods that are left out, with why."""
    mean, depth, scoring = program.recipe.tokens.keep, len(program.layers), attention_layers(program.graphs[PREFILL])
    possible = next((found for head in HEADS if (found := steps(mean, depth, visual, head, scoring))), [])
    few = [possible[place] for place in sorted({0, len(possible) // 2, len(possible) - 1})] if possible else []
    share = flat(mean, depth, visual)
    trials = [_trial(share, name, "", name.partition(" ")[0]) for name in BEFORE]
    left = list(LEFT_OUT)
    for name, score in IN_DECODER.items():
        try:
            trial = _single(program, methods[name], name, score)
        except PlanError as error:
            left.append(f"{name}: {error.what}")
            continue
        if other := sorted({*trial.layers} - {*scoring, INPUT}):
            left.append(f"{name}: layers {other} have no attention to score by")
            continue
        trials.append(trial)
    trials += [_trial(shares, AHEAD, score) for score in INSIDE for shares in few]
    return _distinct(trials), left


def second_trials(program: Program, visual: int, before: Sequence[str], inside: Sequence[str]) -> list[Trial]:
    """The second round: all schedules for the best scores, best ones first."""
    mean, depth, scoring = program.recipe.tokens.keep, len(program.layers), attention_layers(program.graphs[PREFILL])
    trials = [_trial(shares, "", score) for score in inside for shares in steps(mean, depth, visual, 1.0, scoring)]
    trials += [_trial(shares, "", score) for score in inside[:1] for shares in two_steps(mean, depth, visual, scoring)]
    pairs = [(ahead, score) for number, ahead in enumerate(before) for score in inside[: len(inside) - number]]
    for ahead, score in pairs:
        trials += [
            _trial(shares, ahead, score)
            for head in HEADS
            for shares in steps(mean, depth, visual, head, scoring)
            if shares[0] < 1
        ]
    return _distinct(trials)


def best_scores(ranked: Iterable[Trial]) -> tuple[list[str], list[str]]:
    """The best scores before the decoder, by the order of the trials that cut there only, and inside it."""
    before, inside = dict[str, None](), dict[str, None]()
    for trial in ranked:
        layer, _, name = trial.drops[-1]
        if name != RANDOM:
            (before if layer == INPUT else inside).setdefault(name)
    return list(before)[:BEST_BEFORE], list(inside)[:BEST_INSIDE]


def _trial(shares: Shares, before: str, inside: str, method: str | None = None) -> Trial:
    drops = drops_of(shares)
    return Trial(tuple((layer, ratio, before if layer == INPUT else inside) for layer, ratio in drops), method)


def _single(program: Program, pruner: Pruner, method: str, score: str) -> Trial:
    """A method of the harness with its own schedule, at the mean."""
    schedule = pruner.schedule(program)
    keep = final_keep(schedule, program.recipe.tokens.keep, len(program.layers))
    pairs = zip(schedule.layers, schedule.ratios(keep), strict=True)
    return Trial(tuple((layer, ratio, score) for layer, ratio in pairs if ratio < 1), method)


def _distinct(trials: Iterable[Trial]) -> list[Trial]:
    """Each cut list once: the first of equal ones."""
    return list({trial.key: trial for trial in reversed(list(trials))}.values())[::-1]
