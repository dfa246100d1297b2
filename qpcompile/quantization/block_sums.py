"""Weighted block sums of a symmetric matrix: all that optimizing the factors of a Kronecker product needs of it.

    S: [A c, A c] in A x A blocks of c x c        left[a, b] = sum_ij S[a i, b j] w[i, j]
                                                  right[i, j] = sum_ab S[a i, b j] w[a, b]

Neither a float64 copy of S nor, if S = X^T X has few rows, S itself is materialized: at 11,008 channels each takes a
gigabyte, and computing S takes longer than all sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Elements of the rows processed at a time.
PART = 2**22


@dataclass(frozen=True)
class BlockSums(ABC):
    """sizes: (A, c)."""

    sizes: tuple[int, int]

    @abstractmethod
    def left(self, weights: torch.Tensor) -> torch.Tensor:
        """weights: f64[c, c], symmetric -> f64[A, A]."""

    @abstractmethod
    def right(self, weights: torch.Tensor) -> torch.Tensor:
        """weights: f64[A, A], symmetric -> f64[c, c]."""

    def lifted(self, share: float) -> Lifted:
        """Sums of the regularized S: `share` of its mean eigenvalue is added to every eigenvalue."""
        eye = torch.eye(self.sizes[1], dtype=torch.float64, device=self.device)
        return Lifted(self.sizes, self, share * float(self.left(eye).trace()) / (self.sizes[0] * self.sizes[1]))

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the matrix is."""


@dataclass(frozen=True)
class SumsOfMatrix(BlockSums):
    """S = matrix: f[A c, A c]."""

    matrix: torch.Tensor

    def left(self, weights: torch.Tensor) -> torch.Tensor:
        """See `BlockSums`."""
        return torch.stack([(strip * weights[:, None]).sum((0, 2)) for strip in self._strips()])

    def right(self, weights: torch.Tensor) -> torch.Tensor:
        """See `BlockSums`."""
        return sum_of((strip * row[:, None]).sum(1) for row, strip in zip(weights, self._strips(), strict=True))

    @property
    def device(self) -> torch.device:
        """See `BlockSums`."""
        return self.matrix.device

    def _strips(self) -> Iterator[torch.Tensor]:
        """f64[c, A, c], a row of blocks at a time."""
        return (strip.double().unflatten(1, self.sizes) for strip in self.matrix.split(self.sizes[1]))


@dataclass(frozen=True)
class SumsOfRows(BlockSums):
    """S = X^T X, X: the rows of all `matrices`, f[N, A c] each. Products are float32, sums over blocks float64."""

    matrices: Sequence[torch.Tensor]

    def left(self, weights: torch.Tensor) -> torch.Tensor:
        """See `BlockSums`."""
        narrow = weights.float()
        sides = (rows.transpose(0, 1) for rows in self._parts())
        return sum_of(((each @ narrow).flatten(1) @ each.flatten(1).T).double() for each in sides)

    def right(self, weights: torch.Tensor) -> torch.Tensor:
        """See `BlockSums`."""
        narrow = weights.float()
        return sum_of((rows.flatten(0, 1).T @ (narrow @ rows).flatten(0, 1)).double() for rows in self._parts())

    @property
    def device(self) -> torch.device:
        """See `BlockSums`."""
        return self.matrices[0].device

    def _parts(self) -> Iterator[torch.Tensor]:
        """f32[n, A, c], a few rows at a time."""
        for matrix in self.matrices:
            for rows in matrix.split(max(1, PART // matrix.shape[1])):
                yield rows.float().unflatten(1, self.sizes)


@dataclass(frozen=True)
class Lifted(BlockSums):
    """S = what `inner` sums + floor * identity; the sums are where the weights are."""

    inner: BlockSums
    floor: float

    def left(self, weights: torch.Tensor) -> torch.Tensor:
        """See `BlockSums`."""
        return self._raised(self.inner.left(weights.to(self.device)), weights)

    def right(self, weights: torch.Tensor) -> torch.Tensor:
        """See `BlockSums`."""
        return self._raised(self.inner.right(weights.to(self.device)), weights)

    @property
    def device(self) -> torch.device:
        """See `BlockSums`."""
        return self.inner.device

    def _raised(self, found: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found = found.to(weights.device)
        found.diagonal().add_(self.floor * weights.trace())
        return found


def sum_of(terms: Iterator[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one term, without an initial zero."""
    total = next(terms)
    for term in terms:
        total = total + term
    return total
