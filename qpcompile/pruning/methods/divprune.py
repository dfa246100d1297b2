"""DivPrune: before the decoder, select by max-min diversity. Source: DivPrune (arXiv 2503.02175), section 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qpcompile.ir.operators import FARTHEST_TOKENS
from qpcompile.pruning.before_decoder import BeforeDecoder, counted_tokens
from qpcompile.pruning.pruner import Operators, Point, Pruner
from qpcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class DivPrune(BeforeDecoder):
    """See the module's docstring. All pictures of a prompt form one set."""

    operators: ClassVar[Operators] = (FARTHEST_TOKENS,)

    def left_out(self, recipe: Recipe, text: bool, attention: bool) -> tuple[str, ...]:
        """Nothing: it reads embeddings only."""
        return ()

    def scores(self, point: Point) -> fx.Node:
        """Earlier picks are higher."""
        budget = point.share(point.visual)
        return point.only_visual(point.call(FARTHEST_TOKENS, point.hidden(), counted_tokens(point), budget))


METHOD: Pruner = DivPrune()
