"""The interface of weight solvers, which choose the codes of a weight for given scales.

    class Solver:
        needs_moments                                              whether calibration collects sum x x^T for it
        def codes(self, weight, moments, scale, scheme)            i8[N, K]

A solver is the file of its name in solvers/, which holds it as SOLVER; solve.py finds the scales and calls it.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

from qpcompile.calibration.second_moments import SecondMoments
from qpcompile.recipe.quantize import WeightScheme


class Solver(Protocol):
    """One solver."""

    needs_moments: ClassVar[bool]
    """Whether it uses second moments of the inputs, which calibration then collects."""

    def codes(
        self, weight: torch.Tensor, moments: SecondMoments | None, scale: torch.Tensor, scheme: WeightScheme
    ) -> torch.Tensor:
        """weight: f32[N, K]; moments: sum x x^T over inputs f32[K], or None; scale: f32[N, G] -> codes i8[N, K].

        Codes are in `code_range(scheme.bits)` (kernels/quantize_dynamic/reference.py).
        """
        ...


def expand(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """f32[N, G] -> f32[N, K]: the scale of every weight."""
    return scale.repeat_interleave(columns // scale.shape[1], dim=1)
