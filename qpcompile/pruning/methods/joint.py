"""joint: the score and the schedule that cost least on samples, in one search (passes/search_schedule.py).

    candidate   cuts, each after a layer or before the decoder, with a score (qpcompile/pruning/scores.py)
    cost        KL divergence from full precision over the tokens of the full model's own answer

The single methods of the harness are candidates, and it never takes what measures worse than the best of them. Ours.
QUOTA (arXiv 2604.17320) instead distributes a fixed drop by a softmax over each layer's own deviation, and takes one
weighted score for granted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import fx

from qpcompile.errors import RecipeError
from qpcompile.ir.program import Program
from qpcompile.pruning.candidates import CHOSEN
from qpcompile.pruning.pruner import Operators, Point, Pruner, Schedule
from qpcompile.pruning.scores import SCORE_OPERATORS, scores_at
from qpcompile.recipe.quantize import MOST_SAMPLES, Section
from qpcompile.recipe.recipe import Recipe


class JointOptions(Section):
    """Keys of `tokens.options` for `joint`."""

    trial_samples: int = Field(
        default=128,
        ge=1,
        le=MOST_SAMPLES,
        description="Maximum number of samples of the search: every other one to choose, the rest to measure prices.",
    )
    answer_tokens: int = Field(
        default=8, ge=1, le=256, description="Tokens of the full model's answer that candidates are compared on."
    )


@dataclass(frozen=True)
class Joint:
    """See the module's docstring."""

    operators: ClassVar[Operators] = SCORE_OPERATORS
    options: ClassVar[type[Section]] = JointOptions

    def check(self, recipe: Recipe) -> None:
        """Refuse what the search does not measure."""
        if recipe.tokens.keep_of != "mean":
            raise RecipeError(
                "joint searches schedules with one mean; it chooses the share after the last cut itself",
                where="tokens.keep_of",
                do="write mean",
            )
        if recipe.tokens.compact_scored_layer:
            raise RecipeError(
                "joint measures answers that see what prefill saw, also in the layers that score",
                where="tokens.compact_scored_layer",
                do="write false",
            )

    def profiles(self, recipe: Recipe) -> bool:
        """Candidates are evaluated on samples."""
        return True

    def schedule(self, program: Program) -> Schedule:
        """The result of the search; its mean is already the recipe's."""
        chosen = program.measured[CHOSEN]
        layers, ratios, _ = zip(*chosen.trial.drops, strict=True)
        return Schedule(layers, lambda keep: ratios, scores=chosen.scores)

    def scores(self, point: Point) -> fx.Node:
        """The score that was chosen for this cut."""
        assert point.cut.score is not None
        return scores_at(point, point.cut.score)


METHOD: Pruner = Joint()
