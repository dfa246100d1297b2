"""joint: a schedule searched on samples, scored by text attention inside the decoder and diversity before it.

    schedule   the one whose next-token distribution is closest to the full model's (passes/search_schedule.py)
    score      after layer l: attention from the text's queries, mean over heads, of the quantized layer
               before the decoder, where there is no attention yet: CDPruner's relevance and diversity

Ours. QUOTA (arXiv 2604.17320) instead distributes a fixed drop by a softmax over each layer's own deviation, and adds
magnitude, visual attention and residual to the score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import Field
from torch import fx

from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.ir.program import Program
from qpcompile.pruning.methods.cdpruner import CdPruner
from qpcompile.pruning.pruner import INPUT, Operators, Point, Pruner, Schedule
from qpcompile.pruning.queries import QUERIES, attention_from
from qpcompile.pruning.schedules import SCHEDULE, cut_layers_of
from qpcompile.recipe.quantize import MOST_SAMPLES, Section
from qpcompile.recipe.recipe import Recipe


class JointOptions(Section):
    """Keys of `tokens.options` for `joint`."""

    trial_samples: int = Field(
        default=128, ge=1, le=MOST_SAMPLES, description="Maximum number of samples for the schedule search."
    )


@dataclass(frozen=True)
class Joint:
    """See the module's docstring."""

    operators: ClassVar[Operators] = (*CdPruner.operators, TOKEN_SCORES)
    options: ClassVar[type[Section]] = JointOptions
    in_front: Pruner = field(default_factory=CdPruner)

    def profiles(self, recipe: Recipe) -> bool:
        """Schedules are evaluated on samples."""
        return True

    def schedule(self, program: Program) -> Schedule:
        """The result of the search; its mean is already the recipe's."""
        layers, ratios = zip(*cut_layers_of(program.measured[SCHEDULE]), strict=True)
        return Schedule(layers, lambda keep: ratios)

    def scores(self, point: Point) -> fx.Node:
        """Attention from the text, or, before the decoder, relevance and diversity."""
        if point.layer == INPUT:
            return self.in_front.scores(point)
        return attention_from(point, QUERIES[point.recipe.tokens.queries](point), point.attention())


METHOD: Pruner = Joint()
