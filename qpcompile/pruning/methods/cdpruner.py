"""CDPruner: before the decoder, select by relevance to the question and diversity.

    r_i   text_relevance
    L     diag(r) S diag(r), S the cosines of the visual embeddings
    keep  greedy MAP of the determinantal point process L: dpp_select

Source: CDPruner (arXiv 2506.10967), section 3. The cosine with the question is a substitute for CLIP's, see
kernels/text_relevance; all pictures of a prompt form one set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qpcompile.ir.operators import DPP_SELECT, TEXT_RELEVANCE
from qpcompile.pruning.before_decoder import NO_TEXT, BeforeDecoder, counted_tokens, text_relevance
from qpcompile.pruning.pruner import Operators, Point, Pruner
from qpcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class CdPruner(BeforeDecoder):
    """See the module's docstring."""

    operators: ClassVar[Operators] = (TEXT_RELEVANCE, DPP_SELECT)

    def left_out(self, recipe: Recipe, text: bool, attention: bool) -> tuple[str, ...]:
        """Relevance, where there is no text to compare with."""
        return () if text else (NO_TEXT,)

    def scores(self, point: Point) -> fx.Node:
        """Earlier picks are higher."""
        return diverse(point, text_relevance(point))


def diverse(point: Point, relevance: fx.Node) -> fx.Node:
    """f32[B, N]: the order in which the process picks tokens of `relevance: f32[B, N]`, earlier picks higher."""
    budget = point.share(point.visual)
    return point.only_visual(point.call(DPP_SELECT, point.hidden(), relevance, counted_tokens(point), budget))


METHOD: Pruner = CdPruner()
