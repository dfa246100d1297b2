"""FastV: one cut after an early layer, by the last token's attention there.

    score_i = 1/H sum_h A^h[last, i]        of layer K-1, after which keep * V tokens are kept

Source: "FastV" (arXiv 2403.06764), section 4, with K = 2. Both variants of its code are `tokens.position_mode`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.ir.program import Program
from qpcompile.pruning.pruner import Operators, Point, Pruner, Schedule, one_layer
from qpcompile.pruning.queries import attention_from, last
from qpcompile.pruning.risk import with_risk
from qpcompile.recipe.recipe import Recipe

LAYER = 1


@dataclass(frozen=True)
class FastV:
    """See the module's docstring."""

    operators: ClassVar[Operators] = (TOKEN_SCORES,)
    fuses_risk: ClassVar[Literal[True]] = True

    def profiles(self, recipe: Recipe) -> bool:
        """The layer is fixed."""
        return False

    def schedule(self, program: Program) -> Schedule:
        """One cut, after the second layer unless the recipe names another."""
        return Schedule((one_layer(program, LAYER),), lambda keep: (keep,))

    def scores(self, point: Point) -> fx.Node:
        """Attention from the last token, in the layer before the cut."""
        return with_risk(point, attention_from(point, last(point), point.attention()))


METHOD: Pruner = FastV()
