"""Candidates of the search: where the first layer may see all tokens, and where the mean is too small for that."""

from __future__ import annotations

import pytest
from programs import changed_recipe, fresh

from qpcompile.ir.program import Program
from qpcompile.passes.canonicalize import Canonicalize
from qpcompile.pruning.candidates import AHEAD, Trial, best_scores, first_trials, second_trials
from qpcompile.pruning.pruner import INPUT
from qpcompile.pruning.scores import BEFORE, INSIDE
from qpcompile.pruning.table import PRUNERS

VISUAL, LAYERS = 16, 3


def asked(keep: float) -> Program:
    program = fresh(changed_recipe("none", "tokens.method=joint", f"tokens.keep={keep}", "tokens.keep_of=mean"))
    Canonicalize().run(program)
    return program


def mean(trial: Trial) -> float:
    """Of the share of tokens that a layer sees."""
    shares = [1.0] * LAYERS
    for after, ratio, _ in trial.drops:
        shares[after + 1 :] = [ratio] * (LAYERS - after - 1)
    return sum(shares) / LAYERS


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.125])
def test_every_score_is_tried_at_every_mean(keep: float) -> None:
    trials, _ = first_trials(asked(keep), PRUNERS, VISUAL)
    own = [trial for trial in trials if trial.method is None]
    assert {score for trial in own for layer, _, score in trial.drops if layer != INPUT} == set(INSIDE)
    assert {trial.method for trial in trials} >= {"cdpruner", "divprune", "qapruner", "trim", "random_input"}
    assert all(mean(trial) <= keep + 1e-9 for trial in trials)
    ahead = [[score for layer, _, score in trial.drops if layer == INPUT] for trial in own if len(trial.drops) > 1]
    # Half of 3 x 16 tokens lets layer 0 see all 16; a quarter of them does not.
    assert ahead == [] if keep == 0.5 else ahead and all(scores == [AHEAD] for scores in ahead)


def test_the_best_scores_are_combined() -> None:
    program, inside, before = asked(0.25), "intra", "divprune"
    ranked = [
        Trial(((INPUT, 0.5, AHEAD), (0, 0.125, inside))),
        Trial(((INPUT, 0.25, "random_input"),), "random_input"),
        Trial(((INPUT, 0.25, before),), "divprune"),
        Trial(((INPUT, 0.5, AHEAD), (0, 0.125, "text"))),
        Trial(((INPUT, 0.25, AHEAD),), AHEAD),
        Trial(((0, 0.125, "magnitude"),)),
    ]
    assert best_scores(ranked) == ([before, AHEAD], [inside, "text"])
    found = second_trials(program, VISUAL, *best_scores(ranked))
    pairs = {tuple(score for *_, score in trial.drops) for trial in found}
    assert pairs == {(before, inside), (before, "text"), (AHEAD, inside)}
    assert set(BEFORE) > {before, AHEAD} and all(mean(trial) <= 0.25 + 1e-9 for trial in found)
