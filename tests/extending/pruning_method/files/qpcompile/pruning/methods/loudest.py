"""Loudest: before the decoder, keep the visual tokens with the largest embeddings.

score_i = sum_c |x_ic|^p        p: `tokens.options.power`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import fx

from qpcompile.ir.edit import aten
from qpcompile.pruning.before_decoder import BeforeDecoder
from qpcompile.pruning.pruner import Operators, Point, Pruner, options_of
from qpcompile.recipe.quantize import Section


class LoudestOptions(Section):
    """Keys of `tokens.options` for `loudest`."""

    power: int = Field(default=2, ge=1, le=8, description="The power of each channel in the sum.")


@dataclass(frozen=True)
class Loudest(BeforeDecoder):
    """See the module's docstring."""

    operators: ClassVar[Operators] = ()
    options: ClassVar[type[Section]] = LoudestOptions

    def scores(self, point: Point) -> fx.Node:
        """Sums of powers."""
        wide = point.call(aten.to.dtype, point.hidden(), torch.float32)
        powers = point.call(aten.pow.Tensor_Scalar, point.call(aten.abs.default, wide), power_of(point))
        return point.only_visual(point.call(aten.sum.dim_IntList, powers, [2]))


def power_of(point: Point) -> int:
    """The recipe's power."""
    return options_of(LoudestOptions, point.recipe).power


METHOD: Pruner = Loudest()
