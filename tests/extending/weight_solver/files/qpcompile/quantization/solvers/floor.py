"""Round down: q = clamp(floor(w / s), -8, 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qpcompile.calibration.second_moments import SecondMoments
from qpcompile.kernels.quantize_dynamic.reference import code_range
from qpcompile.quantization.solver import Solver, expand
from qpcompile.recipe.quantize import WeightScheme


@dataclass(frozen=True)
class Floor:
    """See the module's docstring."""

    needs_moments: ClassVar[bool] = False

    def codes(
        self, weight: torch.Tensor, moments: SecondMoments | None, scale: torch.Tensor, scheme: WeightScheme
    ) -> torch.Tensor:
        """Every weight by itself."""
        return (weight / expand(scale, weight.shape[1])).floor().clamp(*code_range(scheme.bits)).to(torch.int8)


SOLVER: Solver = Floor()
