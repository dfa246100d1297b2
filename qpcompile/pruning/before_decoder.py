"""Base class of methods that drop tokens once, before the decoder."""

from __future__ import annotations

from torch import fx

from qpcompile.ir.edit import aten
from qpcompile.ir.operators import TEXT_RELEVANCE
from qpcompile.ir.program import Program
from qpcompile.pruning.pruner import INPUT, Point, Schedule
from qpcompile.recipe.recipe import Recipe

NO_TEXT = "relevance: there is no text among the states, so all are equally relevant"


class BeforeDecoder:
    """One cut at the decoder's input; nothing is measured for it."""

    def profiles(self, recipe: Recipe) -> bool:
        """Nothing is measured."""
        return False

    def schedule(self, program: Program) -> Schedule:
        """The decoder's input."""
        return Schedule((INPUT,), lambda keep: (keep,))


def counted_tokens(point: Point) -> fx.Node:
    """bool[B, N]: the live visual tokens."""
    return point.call(aten.bitwise_and.Tensor, point.visual, point.alive)


def text_relevance(point: Point) -> fx.Node:
    """f32[B, N] in 0..1: cosine of visual embeddings with those of the text after them, by the recipe's sign."""
    sign = 1 if point.recipe.tokens.relevance_sign == "plus" else -1
    return point.call(TEXT_RELEVANCE, point.hidden(), point.visual, point.alive, sign)
