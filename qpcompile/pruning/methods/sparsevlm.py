"""SparseVLM: three cuts, by the attention of the text tokens most similar to the picture's embeddings (raters).

    score_i = mean_{t in raters} 1/H sum_h A^h[t, i]        in the layer before the cut

Raters are chosen once, at the decoder's input (qpcompile/pruning/queries.py). Keep ratios follow the lists of the
paper's code, interpolated between lists for other budgets, and along a list for other numbers of cuts.

Source: "SparseVLM" (arXiv 2410.04417), sections 3.2 and 3.3; cuts and lists from its code (Gumpest/SparseVLMs), where
2, 4, 10 and 16 of 32 layers run on each count. Its recycling of dropped tokens into merged ones is not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import fx

from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.ir.program import Program
from qpcompile.pruning.pruner import Operators, Point, Pruner, Schedule, cut_layers, layers_after
from qpcompile.pruning.queries import attention_from, raters
from qpcompile.pruning.risk import with_risk
from qpcompile.recipe.recipe import Recipe

PARTS = (2 / 32, 6 / 32, 16 / 32)
# Tokens of 576 kept after each cut, for 64, 96, 128 and 192 on average; none and all at the ends.
COUNTS = ((0, 0, 0), (66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110), (576, 576, 576))


@dataclass(frozen=True)
class SparseVLM:
    """See the module's docstring."""

    operators: ClassVar[Operators] = (TOKEN_SCORES,)
    fuses_risk: ClassVar[Literal[True]] = True

    def profiles(self, recipe: Recipe) -> bool:
        """The layers are fixed."""
        return False

    def schedule(self, program: Program) -> Schedule:
        """Three cuts, or those of the recipe."""
        layers = cut_layers(program, layers_after(PARTS, len(program.layers)))
        return Schedule(layers, lambda keep: list_ratios(keep, len(layers)))

    def scores(self, point: Point) -> fx.Node:
        """Attention from the raters, in the layer before the cut."""
        return with_risk(point, attention_from(point, raters(point), point.attention()))


def list_ratios(keep: float, cuts: int) -> tuple[float, ...]:
    """Keep ratios after each of `cuts` cuts, the last of them `keep`."""
    table = np.array(COUNTS) / 576
    known = [float(np.interp(keep, table[:, -1], column)) for column in table.T]
    places = np.linspace(0, len(known) - 1, cuts) if cuts > 1 else [len(known) - 1]
    ratios = [float(np.interp(place, range(len(known)), known)) for place in places]
    return (*ratios[:-1], keep)


METHOD: Pruner = SparseVLM()
