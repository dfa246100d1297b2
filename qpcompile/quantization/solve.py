"""Quantize a weight to 4 or 8 bits: find its scales, per output channel or group of inputs, and solve for its codes.

The solvers are the files of solvers/, as solver.py describes them.
"""

from __future__ import annotations

import math
from importlib import import_module

import torch

from qpcompile.calibration.second_moments import SecondMoments, strips
from qpcompile.kernels.quantize_dynamic.reference import code_range, highest
from qpcompile.quantization.solver import Solver, expand
from qpcompile.recipe import choices
from qpcompile.recipe.quantize import QuantizeScheme, WeightScheme

# Elements of the rows whose scales are searched at a time: they stay in a core's cache.
PART = 2**17
CLIPS = tuple(1 - step * 0.02 for step in range(21))

SOLVERS: dict[str, Solver] = {
    name: import_module(f"qpcompile.quantization.solvers.{name}").SOLVER for name in choices.SOLVERS
}


def needs_moments(scheme: WeightScheme) -> bool:
    """Whether the recipe's solver uses second moments of the inputs, from calibration."""
    return SOLVERS[scheme.solver].needs_moments


def uses_moments(scheme: QuantizeScheme) -> bool:
    """Whether the recipe needs second moments of the inputs: for its solver, or to measure errors of weights."""
    return needs_moments(scheme.weights) or scheme.mean_bits.weights is not None


def solve(
    weight: torch.Tensor, moments: SecondMoments | None, scheme: WeightScheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight: f[N, K]; moments: sum x x^T over inputs f32[K], or None -> codes i8[N, K], scale f32[N, G]."""
    wide = weight.detach().float()
    scale = _scales(wide, moments, scheme)
    return SOLVERS[scheme.solver].codes(wide, moments, scale, scheme), scale


def output_error(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, moments: SecondMoments | None
) -> float:
    """||(W - Q) X|| / ||W X|| from the second moments; without them, the error of the weights themselves."""
    error, full = output_energies(weight, codes, scale, moments)
    return math.sqrt(max(error, 0.0) / max(full, 1e-30))


def output_energies(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, moments: SecondMoments | None
) -> tuple[float, float]:
    """||(W - Q) X||^2 and ||W X||^2, as `output_error` takes them."""

    def energy(rows: torch.Tensor) -> torch.Tensor:
        return rows.square().sum(dtype=torch.float64) if moments is None else moments.energy(rows)

    error, full = (torch.zeros((), dtype=torch.float64, device=weight.device) for _ in range(2))
    for part in strips(len(weight)):
        wide = weight[part].detach().float()
        difference = wide - expand(scale[part], wide.shape[1]) * codes[part].float()
        error += energy(difference)
        full += energy(wide)
    return float(error), float(full)


def _scales(weight: torch.Tensor, moments: SecondMoments | None, scheme: WeightScheme) -> torch.Tensor:
    """f32[N, G]: absolute maximum over highest code, or the clipped one with the least weighted squared error."""
    rows, columns = weight.shape
    size = scheme.kernel_group or columns
    groups = weight.view(rows, columns // size, size)
    largest = groups.abs().amax(dim=-1)
    full = torch.where(largest > 0, largest / highest(scheme.bits), torch.ones_like(largest))
    if not scheme.clip_search:
        return full
    importance = torch.ones(columns, device=weight.device) if moments is None else moments.diagonal.clamp(min=0)
    importance = (importance / importance.mean().clamp(min=1e-30)).view(1, columns // size, size)
    parts = zip(groups.split(max(1, PART // columns)), full.split(max(1, PART // columns)), strict=True)
    return torch.cat([_clipped(part, whole, importance, scheme.bits) for part, whole in parts])


def _clipped(groups: torch.Tensor, full: torch.Tensor, importance: torch.Tensor, bits: int) -> torch.Tensor:
    """groups: f32[N, G, C], full: f32[N, G], importance: f32[1, G, C] -> the best of full * CLIPS, f32[N, G]."""
    best, least = full, torch.full_like(full, torch.inf)
    for clip in CLIPS:
        scale = (full * clip)[..., None]
        rounded = (groups / scale).round_().clamp_(*code_range(bits)).mul_(scale)
        error = rounded.sub_(groups).square_().mul_(importance).sum(dim=-1)
        best, least = torch.where(error < least, scale[..., 0], best), torch.minimum(error, least)
    return best
