"""Random tokens on QUOTA's schedule: the baseline for every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.ir.edit import aten
from qpcompile.ir.program import Program
from qpcompile.pruning.methods.quota import sensitivity_schedule
from qpcompile.pruning.pruner import Operators, Point, Pruner, Schedule
from qpcompile.recipe.recipe import Recipe

PRIME, FACTOR = 1048573, 2654435761


@dataclass(frozen=True)
class RandomTokens:
    """See the module's docstring."""

    operators: ClassVar[Operators] = ()

    def profiles(self, recipe: Recipe) -> bool:
        """As for QUOTA, whose schedule it uses."""
        return recipe.tokens.candidate_layers == "auto"

    def schedule(self, program: Program) -> Schedule:
        """QUOTA's."""
        return sensitivity_schedule(program)

    def left_out(self, recipe: Recipe, text: bool, attention: bool) -> tuple[str, ...]:
        """Nothing: a draw needs no measurement."""
        return ()

    def scores(self, point: Point) -> fx.Node:
        """A draw by the recipe's seed."""
        return draw(point)


def draw(point: Point) -> fx.Node:
    """f32[B, N]: a hash of position and seed, the same on every back end.

    Positions are counted from the first token of each row, so that padding does not change the draw.
    """
    position = point.call(aten.cumsum.default, point.valid, 1)
    if point.kept is not None:
        position = point.call(aten.gather.default, position, 1, point.kept)
    shifted = point.call(aten.add.Tensor, position, point.recipe.tokens.seed * 7919 + 1)
    mixed = _modulo(point, shifted, FACTOR)
    # x^5 is a bijection modulo this prime and, unlike x itself, decorrelates neighbours.
    square = _modulo(point, mixed, mixed)
    score = _modulo(point, _modulo(point, square, square), mixed)
    return point.only_visual(point.call(aten.to.dtype, score, torch.float32))


def _modulo(point: Point, left: fx.Node, right: fx.Node | int) -> fx.Node:
    """left * right modulo the largest prime below 2^20, which is exact in float32."""
    return point.call(aten.remainder.Scalar, point.call(aten.mul.Tensor, left, right), PRIME)


METHOD: Pruner = RandomTokens()
