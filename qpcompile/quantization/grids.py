"""The grids of weights that were rounded before: a checkpoint's own codes are taken over, not rounded once more."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qpcompile.ir.measurements import Measurement
from qpcompile.kernels.quantize_dynamic.reference import code_range, highest
from qpcompile.quantization.solver import expand
from qpcompile.recipe.quantize import WeightScheme

ROOM = 1e-4
CHANGED = "the recipe changes the weights before it rounds them"


@dataclass(frozen=True)
class Grid:
    """The grid of one linear's weight: W[n, k] = code * scale[n, g(k)], codes of `bits` bits; scale: f32[N, G]."""

    scale: torch.Tensor
    bits: int

    def mismatch(self, weight: torch.Tensor, scheme: WeightScheme) -> str:
        """Why codes of this grid cannot be those that a recipe asks for; empty if they can. weight: f[N, K]."""
        if self.bits != scheme.bits:
            return f"the checkpoint has {self.bits} bits, the recipe {scheme.bits}"
        columns, groups = weight.shape[1], self.scale.shape[1]
        own, asked = columns // groups, scheme.kernel_group or columns
        if own != asked:
            said = {size: "one scale per channel" if size == columns else f"groups of {size}" for size in (own, asked)}
            return f"the checkpoint has {said[own]}, the recipe {said[asked]}"
        return ""

    def codes(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The codes of a weight f[N, K] that is on the grid, i8[N, K]; None for one that is not.

        A weight of 16 bits is as far from the grid as its type rounds.
        """
        ratio = weight.float() / expand(self.scale, weight.shape[1])
        codes = ratio.round()
        lowest, top = code_range(self.bits)
        near = (ratio - codes).abs().amax() <= highest(self.bits) * torch.finfo(weight.dtype).eps / 2 + ROOM
        return codes.to(torch.int8) if near and codes.amin() >= lowest and codes.amax() <= top else None


GRIDS: Measurement[dict[str, Grid]] = Measurement("grids")
"""Module name of a linear -> its grid, for a model that was loaded from a quantized checkpoint."""
