"""Apply the basis change T D of a linear's input to weights and statistics: T a rotation, D = diag(scale).

    W' = W D^-1 T^-1        x' = T D x        M' = T D M D T^T

A wide T is applied by its factors, C (A + c) operations per row instead of C^2: a layer of a 7B model takes seconds
instead of minutes. A narrow one is a matrix, in fewer calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qpcompile.calibration.second_moments import strips
from qpcompile.calibration.statistics import InputStatistics
from qpcompile.kernels.hadamard.reference import factors_f64, hadamard_matrix

# The width above which a rotation is applied by its factors.
WIDE = 512


@dataclass(frozen=True)
class BasisChange:
    """T D of one input. scale: f64[C], or None for ones; without `rotate` T is the identity."""

    channels: int
    rotate: bool
    scale: torch.Tensor | None
    device: torch.device

    def weights(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: f64[N, C] -> W D^-1 T^-1: f64[N, C]."""
        if self.channels <= WIDE:
            return weight @ self._backward()
        made = torch.empty_like(weight)
        for part in strips(len(weight)):
            made[part] = self._rows(weight[part] if self.scale is None else weight[part] / self.scale)
        return made

    def back(self, vector: torch.Tensor) -> torch.Tensor:
        """vector: f64[C] -> D^-1 T^-1 vector: f64[C]."""
        if self.channels <= WIDE:
            return self._backward() @ vector
        if self.rotate:
            left, right = self._factors()
            vector = (left.T @ vector.view(len(left), len(right)) @ right.T).flatten()
        return vector if self.scale is None else vector / self.scale

    def statistics(self, found: InputStatistics) -> InputStatistics:
        """Statistics of T D x from those of x."""
        if self.channels > WIDE:
            return found.turned(lambda rows: self._rows(rows if self.scale is None else rows * self.scale))
        matrix = rotation(self.channels, self.rotate, self.device)
        return found.transformed(matrix if self.scale is None else matrix * self.scale[None, :])

    def _backward(self) -> torch.Tensor:
        inverse = rotation(self.channels, self.rotate, self.device).T
        return inverse if self.scale is None else inverse / self.scale[:, None]

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        """T applied to each of f64[N, C]."""
        if not self.rotate:
            return rows
        left, right = self._factors()
        blocks = rows.reshape(-1, len(left), len(right))
        return (left @ (blocks @ right)).flatten(1)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = factors_f64(self.channels)
        return left.to(self.device), right.to(self.device)


def rotation(channels: int, rotate: bool, device: torch.device) -> torch.Tensor:
    """T: f64[C, C]."""
    turn = hadamard_matrix(channels).double() if rotate else torch.eye(channels, dtype=torch.float64)
    return turn.to(device)
