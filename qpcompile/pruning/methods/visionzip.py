"""VisionZip: before the decoder, keep tokens with high vision-tower attention, merge the rest into a few spaced ones.

    dominant     the tokens with the highest attention received in the tower (tower.py)
    contextual   evenly spaced among the others; each becomes itself + the mean of the dropped tokens whose keys are
                 closest to its own

Source: "VisionZip" (arXiv 2412.04467), section 3.2; 54 dominant and 10 contextual tokens of 64 as in its released code.
Ours: tokens are cut and merged after the projector, all pictures of a prompt share one budget, and contextual tokens
are at index floor(j R / c) of the R others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from qpcompile.ir.edit import aten
from qpcompile.ir.operators import ATTENTION_RECEIVED, MERGE_TOKENS, SPREAD_TOKENS
from qpcompile.ir.program import Program
from qpcompile.pruning.before_decoder import counted_tokens
from qpcompile.pruning.pruner import INPUT, Operators, Point, Pruner, Schedule
from qpcompile.pruning.risk import with_risk
from qpcompile.pruning.tower import add_tower_outputs
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import VISUAL_KEYS, VISUAL_SCORES

CONTEXTUAL = 10 / 64


@dataclass(frozen=True)
class VisionZip:
    """See the module's docstring."""

    operators: ClassVar[Operators] = (ATTENTION_RECEIVED, SPREAD_TOKENS, MERGE_TOKENS)
    fuses_risk: ClassVar[Literal[True]] = True

    def profiles(self, recipe: Recipe) -> bool:
        """Nothing is measured."""
        return False

    def schedule(self, program: Program) -> Schedule:
        """One cut before the decoder."""
        return Schedule((INPUT,), lambda keep: (keep,))

    def read_tower(self, program: Program) -> None:
        """Attention per head, and the mean of the heads' keys."""
        add_tower_outputs(program, joined_heads=False)

    def scores(self, point: Point) -> fx.Node:
        """2 for dominant tokens, 1 for contextual ones, 0 for dropped tokens."""
        return spread_scores(point, CONTEXTUAL)

    def merge(self, point: Point, scores: fx.Node) -> fx.Node:
        """Add to each contextual token the mean of the dropped tokens closest to it."""
        targets, dropped = (point.call(aten.eq.Scalar, scores, mark) for mark in (1.0, 0.0))
        attention, keys = (point.graph.placeholder(path) for path in (VISUAL_SCORES, VISUAL_KEYS))
        return point.call(MERGE_TOKENS, point.hidden(), keys, attention, targets, dropped, 0)


def spread_scores(point: Point, share: float) -> fx.Node:
    """The most attended tokens and evenly spaced others; `share` of the budget unless the recipe overrides it."""
    asked = point.recipe.tokens.spread_share
    counted = counted_tokens(point)
    marks = point.call(
        SPREAD_TOKENS,
        with_risk(point, point.graph.placeholder(VISUAL_SCORES)),
        counted,
        point.share(point.visual),
        share if asked is None else asked,
    )
    return point.only_visual(marks)


METHOD: Pruner = VisionZip()
