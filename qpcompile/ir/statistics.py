"""What calibration learns, accumulated sample by sample: memory depends on the model, never on the data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class InputStatistics:
    """Of the input of some linears: largest magnitude per channel f32[C], second moments sum x x^T f32[C, C]."""

    largest: torch.Tensor
    moments: torch.Tensor | None
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, moments: bool) -> InputStatistics:
        """Nothing seen yet."""
        square = torch.zeros(channels, channels) if moments else None
        return cls(torch.zeros(channels), square)

    def add(self, x: torch.Tensor) -> None:
        """Take in x: f[..., C]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        if self.moments is not None:
            self.moments += rows.T @ rows
        self.tokens += rows.shape[0]

    def transformed(self, matrix: torch.Tensor) -> InputStatistics:
        """Statistics of `matrix @ x`, matrix: f[C, C]; the largest magnitudes are no longer known and become NaN."""
        wide = matrix.double()
        moments = None if self.moments is None else (wide @ self.moments.double() @ wide.T).float()
        return InputStatistics(torch.full_like(self.largest, torch.nan), moments, self.tokens)


@dataclass
class Calibration:
    """Everything the calibrate pass found: input statistics per site group, and how many samples it saw."""

    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    samples: int = 0
