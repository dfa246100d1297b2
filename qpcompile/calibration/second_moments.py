"""The sum of x x^T over tokens x: of few tokens as the tokens themselves, else as a matrix.

With n tokens of C channels the factor X: f32[n, C] holds X^T X in n C numbers instead of C^2, and what is asked of it
takes as much less work: prompts are often shorter than a layer is wide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Rows of a matrix converted to float64 at a time, to limit memory.
STRIP = 1024
# A factor has at most this part of the matrix's rows: with more, solvers gain nothing by it (solvers/gptq.py).
SHARE = 4

MATRIX, FACTOR = "moments", "tokens_of_moments"


@dataclass(frozen=True)
class SecondMoments:
    """See the module's docstring. f32[C, C] as `matrix`, or f32[n, C] as `factor`; the other is None."""

    matrix: torch.Tensor | None
    factor: torch.Tensor | None = None

    @classmethod
    def empty(cls, channels: int, device: torch.device | None = None) -> SecondMoments:
        """Of no tokens."""
        return cls(None, torch.zeros(0, channels, device=device))

    @classmethod
    def of_tensors(cls, held: dict[str, torch.Tensor]) -> SecondMoments | None:
        """The inverse of `tensors`, among other tensors; None if there are none."""
        found = held.get(MATRIX), held.get(FACTOR)
        return None if found == (None, None) else cls(*found)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensor that is held, by name."""
        return {FACTOR: self.factor} if self.matrix is None else {MATRIX: self.matrix}  # type: ignore[dict-item]

    def to(self, device: torch.device) -> SecondMoments:
        """The same on a device."""
        return SecondMoments(*(None if held is None else held.to(device) for held in (self.matrix, self.factor)))

    def times(self, share: float) -> SecondMoments:
        """Each token counted `share` times; a copy."""
        factor = None if self.factor is None else self.factor * share**0.5
        return SecondMoments(None if self.matrix is None else self.matrix * share, factor)

    def joined(self, other: SecondMoments) -> SecondMoments:
        """Of the tokens of both, in memory of its own."""
        if self.factor is not None and other.factor is not None:
            return self.plus(other.factor)
        return SecondMoments(self.dense() + other.dense())

    def plus(self, rows: torch.Tensor) -> SecondMoments:
        """With the tokens f32[n, C] as well; a matrix is changed in place."""
        if self.factor is None:
            assert self.matrix is not None
            self.matrix.addmm_(rows.T, rows)
            return self
        factor = torch.cat([self.factor, rows])
        few = SHARE * len(factor) <= factor.shape[1]
        return SecondMoments(None, factor) if few else SecondMoments(factor.T @ factor)

    @property
    def diagonal(self) -> torch.Tensor:
        """f32[C]: the sum of squares of every channel."""
        if self.factor is not None:
            return self.factor.square().sum(dim=0)
        assert self.matrix is not None
        return self.matrix.diagonal()

    def dense(self) -> torch.Tensor:
        """The matrix, f32[C, C]."""
        if self.factor is not None:
            return self.factor.T @ self.factor
        assert self.matrix is not None
        return self.matrix

    def energy(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: f32[N, C] -> the sum of || w . x ||^2 over its rows and all tokens, f64[]."""
        if self.factor is not None:
            return (weight @ self.factor.T).square().sum(dtype=torch.float64)
        # The products take as long as a solver: float64 would double that, for digits that nobody reads.
        return ((weight @ self.dense()) * weight).sum(dtype=torch.float64)

    def transformed(self, matrix: torch.Tensor) -> SecondMoments:
        """Of the tokens `matrix @ x`, matrix: f64[C, C]."""
        if self.matrix is None:
            return self.turned(lambda rows: rows @ matrix.T)
        made = torch.empty_like(self.matrix)
        for part in strips(len(matrix)):
            columns = [matrix[part] @ self.matrix[:, each].double() for each in strips(len(made))]
            made[part] = (torch.cat(columns, dim=1) @ matrix.T).float()
        return SecondMoments(made)

    def turned(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> SecondMoments:
        """`transformed` without materializing the matrix: `rows` applies it, f64[N, C] -> f64[N, C]."""
        if self.factor is not None:
            return SecondMoments(None, rows(self.factor.double()).float())
        assert self.matrix is not None
        half, made = torch.empty_like(self.matrix, dtype=torch.float64), torch.empty_like(self.matrix)
        for part in strips(len(made)):
            half[part] = rows(self.matrix[part].double())
        # A X A^T of a symmetric X is symmetric: its rows are its columns.
        for part in strips(len(half)):
            made[part] = rows(half[:, part].T.contiguous()).float()
        return SecondMoments(made)

    def shifted(self, shift: torch.Tensor, total: torch.Tensor, tokens: int) -> SecondMoments:
        """Of the tokens `x - shift`: f64[C]; total: f64[C], the sum of all x; tokens: how many there are."""
        if self.factor is not None:
            return SecondMoments(None, (self.factor.double() - shift).float())
        assert self.matrix is not None
        made = torch.empty_like(self.matrix)
        for part in strips(len(shift)):
            less = torch.outer(total[part], shift) + torch.outer(shift[part], total)
            more = tokens * torch.outer(shift[part], shift)
            made[part] = (self.matrix[part].double() - less + more).float()
        return SecondMoments(made)


def strips(rows: int) -> list[slice]:
    """Row blocks of a large matrix, to avoid a float64 copy of all of it."""
    return [slice(start, start + STRIP) for start in range(0, rows, STRIP)]
