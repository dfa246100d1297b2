"""Random tokens, dropped once before the decoder: the baseline for pre-decoder methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qpcompile.pruning.before_decoder import BeforeDecoder
from qpcompile.pruning.methods.random import draw
from qpcompile.pruning.pruner import Operators, Point, Pruner
from qpcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class RandomInput(BeforeDecoder):
    """See the module's docstring."""

    operators: ClassVar[Operators] = ()

    def left_out(self, recipe: Recipe, text: bool, attention: bool) -> tuple[str, ...]:
        """Nothing: a draw needs no measurement."""
        return ()

    def scores(self, point: Point) -> fx.Node:
        """The draw of `random`."""
        return draw(point)


METHOD: Pruner = RandomInput()
