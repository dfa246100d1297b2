"""GPTQ: compensate the rounding error of each column in the columns after it.

Column by column, through the inverse of H = X X^T + damping * mean(diag) I.

Source: "GPTQ" (arXiv 2210.17323), section 3 and algorithm 1. With far fewer tokens than channels H is never formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from qpcompile.calibration.second_moments import SecondMoments, strips
from qpcompile.kernels.quantize_dynamic.reference import code_range
from qpcompile.quantization.solver import Solver, expand
from qpcompile.quantization.solvers.rtn import RoundToNearest
from qpcompile.recipe.quantize import WeightScheme

BLOCK = 128
# Columns whose rows of the factor are found at a time from the tokens: each time a matrix of all tokens is factored.
WIDE = 4 * BLOCK
# With less damping the tokens' way loses digits: it subtracts numbers that agree in all but the damping.
LEAST_DAMPING = 1e-3


@dataclass(frozen=True)
class Gptq:
    """See the module's docstring. Without moments it falls back to rounding to nearest."""

    needs_moments: ClassVar[bool] = True

    def codes(
        self, weight: torch.Tensor, moments: SecondMoments | None, scale: torch.Tensor, scheme: WeightScheme
    ) -> torch.Tensor:
        """Every column after those before it."""
        if moments is None:
            return RoundToNearest().codes(weight, moments, scale, scheme)
        return _gptq(weight, moments, scale, scheme)


def _gptq(weight: torch.Tensor, moments: SecondMoments, scale: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    columns, dead = weight.shape[1], moments.diagonal <= 0
    work = weight.clone()
    work[:, dead] = 0
    steps = expand(scale, columns)
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    start = 0
    for inverse in _inverse_rows(moments, dead, scheme.damping):
        count = len(inverse)
        end = start + count
        # Columns as rows: each is read and written as one piece of memory.
        part, sizes = work[:, start:end].T.contiguous(), steps[:, start:end].T.contiguous()
        rounded, errors = torch.empty_like(part), torch.empty_like(part)
        for column, row in enumerate(inverse[:, :count]):
            torch.div(part[column], sizes[column], out=rounded[column]).round_().clamp_(*code_range(scheme.bits))
            error = torch.sub(part[column], rounded[column] * sizes[column], out=errors[column]).div_(row[column])
            part[column + 1 :].addr_(row[column + 1 :], error, alpha=-1)
        codes[:, start:end] = rounded.T.to(torch.int8)
        work[:, end:] -= errors.T @ inverse[:, count:]
        start = end
    return codes


def _inverse_rows(moments: SecondMoments, dead: torch.Tensor, damping: float) -> Iterator[torch.Tensor]:
    """The upper Cholesky factor of H^-1, BLOCK rows at a time, each from its diagonal on: f32[B, K - start]."""
    if moments.factor is not None and damping >= LEAST_DAMPING:
        yield from _rows_by_tokens(moments.factor, dead, damping)
        return
    factor = _inverse_factor(moments.dense(), dead, damping)
    for start in range(0, len(factor), BLOCK):
        yield factor[start : start + BLOCK, start:]


def _rows_by_tokens(tokens: torch.Tensor, dead: torch.Tensor, damping: float) -> Iterator[torch.Tensor]:
    """`_inverse_rows` from the tokens X: f32[n, K], by matrices of n x n only.

    H = X^T X + d I. Rows of the factor belong to the inverse of H without the columns before them, which is
    (I - X^T (X X^T + d I)^-1 X) / d on the columns that are left: a block's rows of that, times the inverse of the
    transposed Cholesky factor of its own square. Columns that are zero have no part in it.
    """
    x = tokens.double()
    diagonal = x.square().sum(dim=0)
    diagonal[dead] = 1.0
    damped = damping * diagonal.mean()
    gram = x @ x.T
    gram.diagonal().add_(damped)
    for start in range(0, x.shape[1], WIDE):
        rest = x[:, start:]
        block = rest[:, :WIDE]
        solved = torch.cholesky_solve(block, torch.linalg.cholesky(gram))
        rows = solved.T @ rest
        rows.neg_().diagonal().add_(1.0)
        rows.div_(damped)
        square = torch.linalg.cholesky(rows[:, : len(rows)])
        rows = torch.linalg.solve_triangular(square, rows, upper=False).float()
        for first in range(0, len(rows), BLOCK):
            yield rows[first : first + BLOCK, first:]
        gram.addmm_(block, block.T, alpha=-1)


def _inverse_factor(moments: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of H^-1, f32[K, K].

    With rows and columns reversed H is L L^T, L lower triangular, and the factor is L^-1 reversed. It takes half the
    operations of inverting H and factoring the inverse. An f64[K, K] takes gigabytes, so there is only one.
    """
    matrix = moments.to(torch.float64, copy=True)
    matrix[dead, dead] = 1.0
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    _reverse(matrix)
    # LAPACK works in place on columns; the matrix is symmetric, so its rows are as good.
    matrix = matrix.mT
    torch.linalg.cholesky(matrix, out=matrix)
    _invert_lower(matrix)
    _reverse(matrix)
    return matrix.float()


def _reverse(matrix: torch.Tensor) -> None:
    """Reverse the rows and the columns of a square matrix in place, two rows at a time."""
    size = len(matrix)
    for row in range((size + 1) // 2):
        first, last = matrix[row].flip(0), matrix[size - 1 - row].flip(0)
        matrix[row], matrix[size - 1 - row] = last, first


def _invert_lower(matrix: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place.

    [A, 0; B, C]^-1 = [A^-1, 0; -C^-1 B A^-1, C^-1]
    """
    size = len(matrix)
    if size <= 2 * BLOCK:
        one = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, one, upper=False))
        return
    half = size // 2
    a, b, c = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    for part in strips(half):
        b[:, part] = torch.linalg.solve_triangular(c, b[:, part], upper=False)
    for part in strips(size - half):
        b[part] = torch.linalg.solve_triangular(a, b[part], upper=False, left=False).neg_()
    _invert_lower(a)
    _invert_lower(c)


SOLVER: Solver = Gptq()
