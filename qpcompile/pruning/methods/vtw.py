"""VTW (visual tokens withdrawal): drop all visual tokens after layer K.

The mean over layers follows from K alone: with `keep_of: mean`, K is the last layer for which it is at most `keep`.

Source: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference"
(arXiv 2405.05803), section 3; K is measured in the paper, and a recipe key here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.edit import aten
from qpcompile.ir.program import Program
from qpcompile.pruning.pruner import Operators, Point, Pruner, Schedule, one_layer
from qpcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class Withdraw:
    """See the module's docstring."""

    operators: ClassVar[Operators] = ()

    def profiles(self, recipe: Recipe) -> bool:
        """Nothing is measured."""
        return False

    def schedule(self, program: Program) -> Schedule:
        """One cut that keeps nothing; PlanError unless exactly one of K and the mean is given."""
        tokens = program.recipe.tokens
        if (tokens.candidate_layers == "auto") != (tokens.keep_of == "mean"):
            raise PlanError(
                "vtw keeps no visual token after its cut: it needs exactly one of the layer and the mean",
                where="tokens.candidate_layers, tokens.keep_of",
                do="write keep_of: mean and a keep, or keep_of: final and one layer in candidate_layers",
            )
        # Slightly more than the product, so that 0.3 of 10 layers is 3.
        layers = int(tokens.keep * len(program.layers) + 1e-9)
        if tokens.candidate_layers == "auto" and not 0 < layers < len(program.layers):
            raise PlanError(
                f"a mean of {tokens.keep} over {len(program.layers)} layers is {layers} layers that see the picture",
                where="tokens.keep",
                do=f"ask for at least {1 / len(program.layers):.4f} and less than 1",
            )
        return Schedule((one_layer(program, layers - 1),), lambda keep: (0.0,))

    def scores(self, point: Point) -> fx.Node:
        """Constant: no visual token is kept."""
        nothing = point.call(aten.to.dtype, point.visual, torch.float32)
        return point.only_visual(nothing)


METHOD: Pruner = Withdraw()
