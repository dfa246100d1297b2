"""PruMerge+: before the decoder, keep tokens with high vision-tower attention and spaced ones; merge neighbours.

    kept     the tokens with the highest attention received (one softmax over all heads concatenated), and evenly spaced
    ones
    x_i   <- x_i + sum of a_j x_j over the 32 other tokens j with the closest keys, a = attention shares of the prompt

Source: "LLaVA-PruMerge" (arXiv 2403.15388), section 3, and its released code. The count there depends on the picture
(outliers of the attention), here it is the recipe's: a quarter for outliers and the rest spaced, which corresponds to a
spacing of a third of the outliers'. Also ours: the layer is the one whose output the model uses, tokens are cut and
merged after the projector, shares sum to 1 over the visual tokens of a prompt, and the extra token that the source
appends for all dropped ones is omitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from qpcompile.ir.edit import aten
from qpcompile.ir.operators import ATTENTION_RECEIVED, MERGE_TOKENS, SPREAD_TOKENS
from qpcompile.ir.program import Program
from qpcompile.pruning.methods.visionzip import spread_scores
from qpcompile.pruning.pruner import INPUT, Operators, Point, Pruner, Schedule
from qpcompile.pruning.tower import add_tower_outputs
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.machine import VISUAL_KEYS, VISUAL_SCORES

SPACED = 3 / 4
NEIGHBOURS = 32


@dataclass(frozen=True)
class PruMergePlus:
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
        """Attention and keys of all heads concatenated."""
        add_tower_outputs(program, joined_heads=True)

    def scores(self, point: Point) -> fx.Node:
        """2 for the most attended tokens, 1 for the spaced ones, 0 for dropped tokens."""
        return spread_scores(point, SPACED)

    def merge(self, point: Point, scores: fx.Node) -> fx.Node:
        """Add to every kept token the attention-weighted sum of its neighbours."""
        attention, keys = (point.graph.placeholder(path) for path in (VISUAL_SCORES, VISUAL_KEYS))
        visual = point.call(aten.bitwise_and.Tensor, point.visual, point.alive)
        stays = point.call(aten.bitwise_and.Tensor, visual, point.call(aten.gt.Scalar, scores, 0.0))
        counted = point.call(aten.where.ScalarOther, visual, attention, 0.0)
        total = point.call(aten.sum.dim_IntList, counted, [1], True)
        shares = point.call(aten.div.Tensor, counted, point.call(aten.clamp_min.default, total, 1e-12))
        return point.call(MERGE_TOKENS, point.hidden(), keys, shares, stays, visual, NEIGHBOURS)


METHOD: Pruner = PruMergePlus()
