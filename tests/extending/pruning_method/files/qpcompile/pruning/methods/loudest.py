"""Loudest: before the decoder, keep the visual tokens with the largest embeddings.

score_i = sum_c x_ic^2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.ir.edit import aten
from qpcompile.pruning.before_decoder import BeforeDecoder
from qpcompile.pruning.pruner import Operators, Point, Pruner


@dataclass(frozen=True)
class Loudest(BeforeDecoder):
    """See the module's docstring."""

    operators: ClassVar[Operators] = ()

    def scores(self, point: Point) -> fx.Node:
        """Sums of squares."""
        wide = point.call(aten.to.dtype, point.hidden(), torch.float32)
        squares = point.call(aten.mul.Tensor, wide, wide)
        return point.only_visual(point.call(aten.sum.dim_IntList, squares, [2]))


METHOD: Pruner = Loudest()
