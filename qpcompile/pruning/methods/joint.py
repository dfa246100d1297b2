"""joint: the best of several schedules tried on samples, attention of the text inside the decoder, diversity before it.

    schedule   the one whose next token is closest to the full model's (passes/search_schedule.py): a layer that reads
               the picture keeps it, layers that have read it let it go
    score      behind layer l: attention from the text's queries, mean over heads, of the quantized layer
               in front of the decoder, where nothing has looked yet: CDPruner's relevance and diversity

Ours. QUOTA (arXiv 2604.17320) shares a fixed drop by a softmax over each layer's own deviation, and mixes magnitude,
visual attention and residual into the score.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from qpcompile.ir.program import Program
from qpcompile.pruning.methods.cdpruner import CdPruner
from qpcompile.pruning.pruner import INPUT, Point, Pruner, Schedule
from qpcompile.pruning.queries import QUERIES, attention_from
from qpcompile.pruning.schedules import SCHEDULE, cut_layers_of
from qpcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class Joint:
    """See the module's docstring."""

    in_front: Pruner = field(default_factory=CdPruner)

    def profiles(self, recipe: Recipe) -> bool:
        """Schedules are tried on samples."""
        return True

    def schedule(self, program: Program) -> Schedule:
        """What the search found; its mean is the recipe's already."""
        layers, ratios = zip(*cut_layers_of(program.measured[SCHEDULE]), strict=True)
        return Schedule(layers, lambda keep: ratios)

    def scores(self, point: Point) -> fx.Node:
        """What the text looks at, or, in front of the decoder, what is relevant and unlike the rest."""
        if point.layer == INPUT:
            return self.in_front.scores(point)
        return attention_from(point, QUERIES[point.recipe.tokens.queries](point), point.attention())


METHODS: dict[str, Pruner] = {"joint": Joint()}
