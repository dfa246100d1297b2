"""Running statistics of what flows into linears: memory depends on the model, never on the data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

# Tokens of each site that are kept as they are, to try roundings on.
ROWS = 512


@dataclass
class InputStatistics:
    """Of the input of some linears.

    largest: f32[C], largest magnitude per channel; moments: f32[C, C], sum x x^T, or None; total: f32[C], sum x;
    rows: f32[R, C], up to ROWS of the tokens themselves.
    """

    largest: torch.Tensor
    moments: torch.Tensor | None
    total: torch.Tensor
    rows: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, moments: bool) -> InputStatistics:
        """Nothing seen yet."""
        square = torch.zeros(channels, channels) if moments else None
        return cls(torch.zeros(channels), square, torch.zeros(channels), torch.zeros(0, channels))

    def add(self, x: torch.Tensor, keep: int = ROWS) -> None:
        """Take in x: f[..., C]; up to `keep` of its tokens, evenly spaced, are kept as they are."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not rows.shape[0]:
            return
        self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        if self.moments is not None:
            self.moments += rows.T @ rows
        self.total += rows.sum(dim=0)
        self.tokens += rows.shape[0]
        count = min(keep, rows.shape[0], ROWS - self.rows.shape[0])
        if count > 0:
            chosen = torch.arange(count) * rows.shape[0] // count
            self.rows = torch.cat([self.rows, rows[chosen]])

    @property
    def mean(self) -> torch.Tensor:
        """The mean token, f32[C]."""
        return self.total / max(self.tokens, 1)

    def transformed(self, matrix: torch.Tensor) -> InputStatistics:
        """Statistics of `matrix @ x`, matrix: f[C, C]; the largest magnitudes are no longer known and become NaN."""
        wide = matrix.double()
        moments = None if self.moments is None else (wide @ self.moments.double() @ wide.T).float()
        total, rows = (wide @ self.total.double()).float(), (self.rows.double() @ wide.T).float()
        return InputStatistics(torch.full_like(self.largest, torch.nan), moments, total, rows, self.tokens)

    def shifted(self, shift: torch.Tensor) -> InputStatistics:
        """Statistics of `x - shift`, shift: f[C]; the largest magnitudes are no longer known and become NaN."""
        away, total, moments = shift.double(), self.total.double(), self.moments
        if moments is not None:
            cross = torch.outer(total, away)
            moments = (moments.double() - cross - cross.T + self.tokens * torch.outer(away, away)).float()
        rows = (self.rows.double() - away).float()
        total = (total - self.tokens * away).float()
        return InputStatistics(torch.full_like(self.largest, torch.nan), moments, total, rows, self.tokens)


@dataclass
class Calibration:
    """Everything the calibrate pass found: input statistics per site group, and how many samples it saw."""

    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    samples: int = 0
