"""Scores that the method `joint` chooses from, by name: those before the decoder, and those after a layer.

    before    the choices of the methods that cut there; (minus): relevance with the other sign
    inside    text       attention from the text after the picture; (last): from its last token; (raters)
              quota      QUOTA's weighted sum, its weights from the recipe; (minus magnitude): that weight negated
              one cue    magnitude, intra, residual alone; (minus): the lowest are kept
              fitted     weights solved for what dropping a token costs (qpcompile/pruning/fit.py)

A large norm marks an object in one model and background in another, so no sign is taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.pruning.methods.cdpruner import CdPruner
from qpcompile.pruning.methods.divprune import DivPrune
from qpcompile.pruning.methods.qapruner import QaPruner
from qpcompile.pruning.methods.quota import weighted_scores
from qpcompile.pruning.methods.random_input import RandomInput
from qpcompile.pruning.methods.trim import Trim
from qpcompile.pruning.pruner import INPUT, Operators, Point
from qpcompile.recipe.choice import Score

RANDOM = "random_input"
FITTED = {"fitted": "after_image", "fitted (last)": "last"}
"""Fitted scores, and whose attention is their first cue."""
# Queries, and weights of inter, magnitude, intra and residual.
_SINGLE = {
    "text": ("after_image", (1.0, 0.0, 0.0, 0.0)),
    "text (last)": ("last", (1.0, 0.0, 0.0, 0.0)),
    "text (raters)": ("raters", (1.0, 0.0, 0.0, 0.0)),
    "magnitude": ("after_image", (0.0, 1.0, 0.0, 0.0)),
    "magnitude (minus)": ("after_image", (0.0, -1.0, 0.0, 0.0)),
    "intra": ("after_image", (0.0, 0.0, 1.0, 0.0)),
    "intra (minus)": ("after_image", (0.0, 0.0, -1.0, 0.0)),
    "residual": ("after_image", (0.0, 0.0, 0.0, 1.0)),
    "residual (minus)": ("after_image", (0.0, 0.0, 0.0, -1.0)),
}
SCORE_OPERATORS: Operators = tuple(
    dict.fromkeys((*CdPruner.operators, *DivPrune.operators, *Trim.operators, *QaPruner.operators, TOKEN_SCORES))
)


def _signed(scores: Callable[[Point], fx.Node], sign: str) -> Callable[[Point], fx.Node]:
    """A method's scores with this sign of relevance, whatever the recipe says."""

    def scored(point: Point) -> fx.Node:
        tokens = point.recipe.tokens.model_copy(update={"relevance_sign": sign})
        return scores(replace(point, recipe=point.recipe.model_copy(update={"tokens": tokens})))

    return scored


BEFORE: dict[str, Callable[[Point], fx.Node]] = {
    "cdpruner": _signed(CdPruner().scores, "plus"),
    "cdpruner (minus)": _signed(CdPruner().scores, "minus"),
    "divprune": DivPrune().scores,
    "trim": _signed(Trim().scores, "plus"),
    "trim (minus)": _signed(Trim().scores, "minus"),
    "qapruner": _signed(QaPruner().scores, "plus"),
    RANDOM: RandomInput().scores,
}
INSIDE = ("text", "text (last)", "text (raters)", "quota", "quota (minus magnitude)", *list(_SINGLE)[3:], *FITTED)


def scores_at(point: Point, score: Score) -> fx.Node:
    """f32[B, N] at a cut, by the score's name."""
    if point.layer == INPUT:
        return BEFORE[score.name](point)
    tokens = point.recipe.tokens
    if score.name in FITTED:
        return weighted_scores(point, score.weights, FITTED[score.name], tokens.normalize)
    if score.name in _SINGLE:
        queries, weights = _SINGLE[score.name]
        return weighted_scores(point, weights, queries, "none")
    sign = -1 if score.name == "quota (minus magnitude)" else 1
    return weighted_scores(point, quota_weights(point, sign), tokens.queries, tokens.normalize)


def quota_weights(point: Point, sign: int) -> Sequence[float]:
    """The recipe's weights, that of magnitude with this sign."""
    weights = point.recipe.tokens.weights
    return weights.inter, sign * weights.magnitude, weights.intra, weights.residual
