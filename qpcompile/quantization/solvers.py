"""Weight quantization solvers to 4 bits: round-to-nearest (RTN) and GPTQ.

    rtn    q = clamp(round(w / s), -8, 7), s per output channel or per group of inputs
    gptq   column by column; the rounding error of each is compensated in the columns after it through the
           inverse of H = X X^T + damping * mean(diag) I

Source: "GPTQ" (arXiv 2210.17323), section 3 and algorithm 1.
"""

from __future__ import annotations

import torch

from qpcompile.calibration.statistics import strips
from qpcompile.recipe.quantize import WeightScheme

LOWEST, HIGHEST = -8, 7
BLOCK = 128
CLIPS = tuple(1 - step * 0.02 for step in range(21))


def solve(
    weight: torch.Tensor, moments: torch.Tensor | None, scheme: WeightScheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight: f[N, K]; moments: f32[K, K] (sum x x^T) or None -> codes i8[N, K], scale f32[N, G].

    Without moments GPTQ falls back to rounding to nearest.
    """
    wide = weight.detach().float()
    scale = _scales(wide, moments, scheme)
    if scheme.solver == "gptq" and moments is not None:
        return _gptq(wide, moments, scale, scheme.damping), scale
    return _round(wide, scale), scale


def output_error(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, moments: torch.Tensor | None) -> float:
    """||(W - Q) X|| / ||W X|| from the second moments; without them, the error of the weights themselves."""
    if moments is None:
        wide = weight.detach().double()
        difference = wide - _expand(scale, wide.shape[1]).double() * codes.double()
        return float(difference.norm() / wide.norm().clamp(min=1e-30))
    square = moments.double()
    error, full = square.new_zeros(()), square.new_zeros(())
    for part in strips(len(weight)):
        wide = weight[part].detach().double()
        difference = wide - _expand(scale[part], wide.shape[1]).double() * codes[part].double()
        error += ((difference @ square) * difference).sum()
        full += ((wide @ square) * wide).sum()
    return float((error.clamp(min=0) / full.clamp(min=1e-30)).sqrt())


def _scales(weight: torch.Tensor, moments: torch.Tensor | None, scheme: WeightScheme) -> torch.Tensor:
    """f32[N, G]: the absolute maximum over 7, or the clipped one with the least weighted squared error."""
    rows, columns = weight.shape
    size = scheme.kernel_group or columns
    groups = weight.view(rows, columns // size, size)
    largest = groups.abs().amax(dim=-1)
    full = torch.where(largest > 0, largest / HIGHEST, torch.ones_like(largest))
    if not scheme.clip_search:
        return full
    importance = torch.ones(columns, device=weight.device) if moments is None else moments.diagonal().clamp(min=0)
    importance = (importance / importance.mean().clamp(min=1e-30)).view(1, columns // size, size)
    best, least = full, torch.full_like(full, torch.inf)
    for clip in CLIPS:
        scale = full * clip
        rounded = (groups / scale[..., None]).round().clamp(LOWEST, HIGHEST) * scale[..., None]
        error = ((groups - rounded).pow(2) * importance).sum(dim=-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _gptq(weight: torch.Tensor, moments: torch.Tensor, scale: torch.Tensor, damping: float) -> torch.Tensor:
    columns, dead = weight.shape[1], moments.diagonal() <= 0
    work, inverse = weight.clone(), _inverse_factor(moments, dead, damping)
    work[:, dead] = 0
    steps = _expand(scale, columns)
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros(weight.shape[0], end - start, device=weight.device)
        for column in range(start, end):
            value = work[:, column]
            code = (value / steps[:, column]).round().clamp(LOWEST, HIGHEST)
            codes[:, column] = code.to(torch.int8)
            error = (value - code * steps[:, column]) / inverse[column, column]
            work[:, column:end] -= error[:, None] * inverse[column, column:end][None]
            errors[:, column - start] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return codes


def _inverse_factor(moments: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of H^-1, f32[K, K]. Each f64[K, K] may take a gigabyte: at most two at once."""
    matrix = moments.to(torch.float64, copy=True)
    matrix[dead, dead] = 1.0
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    matrix = torch.linalg.cholesky(matrix)
    matrix = torch.cholesky_inverse(matrix)
    matrix = torch.linalg.cholesky(matrix, upper=True)
    return matrix.float()


def _round(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / _expand(scale, weight.shape[1])).round().clamp(LOWEST, HIGHEST).to(torch.int8)


def _expand(scale: torch.Tensor, columns: int) -> torch.Tensor:
    return scale.repeat_interleave(columns // scale.shape[1], dim=1)
