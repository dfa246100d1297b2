"""DART: after the second layer, keep pivot tokens and those least similar to them; dropped tokens are near-duplicates.

Source: DART (arXiv 2502.11494), section 4, with the settings of its code: after the decoder's second layer, pivots by
the L1 norm of that layer's keys, 4 among visual tokens and 4 among the text after them. Ours: cosines are of the
residual stream, without the decoder's final norm, and the remainder of a budget is divided evenly
(kernels/pivot_tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qpcompile.ir.operators import PIVOT_TOKENS
from qpcompile.ir.program import Program
from qpcompile.pruning.pruner import Operators, Point, Pruner, Schedule, one_layer
from qpcompile.recipe.recipe import Recipe

SECOND_LAYER = 1


@dataclass(frozen=True)
class Dart:
    """See the module's docstring."""

    operators: ClassVar[Operators] = (PIVOT_TOKENS,)
    visual_pivots: int = 4
    text_pivots: int = 4

    def profiles(self, recipe: Recipe) -> bool:
        """Nothing is measured."""
        return False

    def schedule(self, program: Program) -> Schedule:
        """One cut, after the second layer or the one in the recipe."""
        return Schedule((one_layer(program, SECOND_LAYER),), lambda keep: (keep,))

    def scores(self, point: Point) -> fx.Node:
        """2 for pivots, 1 for the tokens least similar to one, 0 for dropped tokens."""
        chosen = point.call(
            PIVOT_TOKENS,
            point.hidden(),
            point.attention().key,
            point.visual,
            point.alive,
            point.share(point.visual),
            self.visual_pivots,
            self.text_pivots,
        )
        return point.only_visual(chosen)


METHOD: Pruner = Dart()
