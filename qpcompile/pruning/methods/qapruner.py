"""QAPruner: CDPruner's selection before the decoder, with the quantization risk of each token in the relevance.

    r_i   a relevance_i + (1 - a) risk_i        a: `tokens.risk.alpha`

Source: QAPruner (arXiv 2604.02816), section 3, with the fusion of its code, into the relevance rather than into a
final score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qpcompile.ir.operators import DPP_SELECT, TEXT_RELEVANCE
from qpcompile.pruning.before_decoder import NO_TEXT, BeforeDecoder, text_relevance
from qpcompile.pruning.methods.cdpruner import diverse
from qpcompile.pruning.pruner import Operators, Point, Pruner
from qpcompile.pruning.risk import RISK_OPERATORS, fuse_risk
from qpcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class QaPruner(BeforeDecoder):
    """See the module's docstring."""

    operators: ClassVar[Operators] = (TEXT_RELEVANCE, *RISK_OPERATORS, DPP_SELECT)

    def left_out(self, recipe: Recipe, text: bool, attention: bool) -> tuple[str, ...]:
        """Relevance, where there is no text to compare with."""
        return () if text else (NO_TEXT,)

    def scores(self, point: Point) -> fx.Node:
        """Earlier picks are higher."""
        return diverse(point, fuse_risk(point, text_relevance(point), minmax=False))


METHOD: Pruner = QaPruner()
