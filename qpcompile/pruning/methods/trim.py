"""TRIM: before the decoder, select by similarity to the question, with a static count.

Source: TRIM (arXiv 2409.10994), section 3. Softmax preserves the order of the similarities, so the highest ones are
selected. Ours: the cosine is a substitute for CLIP's (kernels/text_relevance), the count is the recipe's rather than
the number of outliers, and the mean of the dropped tokens is not appended: it would be a token without a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.operators import TEXT_RELEVANCE
from qpcompile.pruning.before_decoder import BeforeDecoder, text_relevance
from qpcompile.pruning.pruner import Operators, Point, Pruner
from qpcompile.pruning.risk import with_risk
from qpcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class Trim(BeforeDecoder):
    """See the module's docstring."""

    operators: ClassVar[Operators] = (TEXT_RELEVANCE,)
    fuses_risk: ClassVar[Literal[True]] = True

    def left_out(self, recipe: Recipe, text: bool, attention: bool) -> tuple[str, ...]:
        """Nothing; PlanError where there is no text to compare with."""
        if not text:
            raise PlanError(
                "trim scores by the text among visual tokens, and what cross-attention reads has none",
                where="tokens.method",
                do="choose quota, divprune or random_input",
            )
        return ()

    def scores(self, point: Point) -> fx.Node:
        """The relevance, with the risk if asked: QAPruner's selection as its text has it, by the score alone."""
        return point.only_visual(with_risk(point, text_relevance(point)))


METHOD: Pruner = Trim()
