"""GPTQ: compensate the rounding error of each column in the columns after it.

Column by column, through the inverse of H = X X^T + damping * mean(diag) I.

Source: "GPTQ" (arXiv 2210.17323), section 3 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qpcompile.kernels.quantize_dynamic.reference import code_range
from qpcompile.quantization.solver import Solver, expand
from qpcompile.quantization.solvers.rtn import RoundToNearest
from qpcompile.recipe.quantize import WeightScheme

BLOCK = 128


@dataclass(frozen=True)
class Gptq:
    """See the module's docstring. Without moments it falls back to rounding to nearest."""

    needs_moments: ClassVar[bool] = True

    def codes(
        self, weight: torch.Tensor, moments: torch.Tensor | None, scale: torch.Tensor, scheme: WeightScheme
    ) -> torch.Tensor:
        """Every column after those before it."""
        if moments is None:
            return RoundToNearest().codes(weight, moments, scale, scheme)
        return _gptq(weight, moments, scale, scheme)


def _gptq(weight: torch.Tensor, moments: torch.Tensor, scale: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    columns, dead = weight.shape[1], moments.diagonal() <= 0
    work, inverse = weight.clone(), _inverse_factor(moments, dead, scheme.damping)
    work[:, dead] = 0
    steps = expand(scale, columns)
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        # Columns as rows: each is read and written as one piece of memory.
        part, sizes = work[:, start:end].T.contiguous(), steps[:, start:end].T.contiguous()
        rounded, errors = torch.empty_like(part), torch.empty_like(part)
        for column, row in enumerate(inverse[start:end, start:end]):
            torch.div(part[column], sizes[column], out=rounded[column]).round_().clamp_(*code_range(scheme.bits))
            error = torch.sub(part[column], rounded[column] * sizes[column], out=errors[column]).div_(row[column])
            part[column + 1 :].addr_(row[column + 1 :], error, alpha=-1)
        codes[:, start:end] = rounded.T.to(torch.int8)
        work[:, end:] -= errors.T @ inverse[start:end, end:]
    return codes


def _inverse_factor(moments: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of H^-1, f32[K, K]. An f64[K, K] takes gigabytes, so there is only one."""
    matrix = moments.to(torch.float64, copy=True)
    matrix[dead, dead] = 1.0
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    # LAPACK works in place on columns; the matrix is symmetric, so its rows are as good.
    matrix = matrix.mT
    torch.linalg.cholesky(matrix, out=matrix)
    torch.cholesky_inverse(matrix, out=matrix)
    torch.linalg.cholesky(matrix, upper=True, out=matrix)
    return matrix.float()


SOLVER: Solver = Gptq()
