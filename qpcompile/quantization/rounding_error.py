"""The error that rounding causes at the outputs of linears, on calibration tokens.

    inputs     of each token  || W (Q_r(x) - x) ||^2                             scale of Q_r = r max|x| / h
    weights    tr((W - Q) H (W - Q)^T) / tr(W H W^T)                             H = sum x x^T, Q to nearest

`rounding_errors` averages visual and text tokens separately: text tokens are few, but the answer is generated from
them. `input_cost` and `weight_cost` weigh tokens by what their error costs (loss_sensitivity.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qpcompile.calibration.statistics import InputStatistics
from qpcompile.quantization.fake_quant import round_trip
from qpcompile.quantization.loss_sensitivity import LossSensitivity
from qpcompile.quantization.solve import output_error, solve
from qpcompile.recipe.quantize import ActivationScheme, WeightScheme

RATIOS = tuple(1 - 0.03 * step for step in range(15))


def rounding_errors(
    statistics: InputStatistics, weights: torch.Tensor, scheme: ActivationScheme, ratios: Sequence[float]
) -> list[float]:
    """weights: f[N, C] of all linears that read the input -> the error with each clip ratio."""
    rows, visual = statistics.rows, statistics.visual
    square = _squares(weights.float(), len(ratios) * len(rows))
    shares = torch.where(visual, 1 / visual.sum(), 1 / (~visual).sum())
    errors = (round_trip(rows, scheme.kernel_group, ratio, scheme.bits) - rows for ratio in ratios)
    return [float(square(error) @ shares) for error in errors]


@dataclass(frozen=True)
class Reader:
    """A linear: its weight, f[N, C], and what a squared error of its output costs at each stored token, f32[R]."""

    weight: torch.Tensor
    costs: torch.Tensor


def readers(
    statistics: InputStatistics, weights: Mapping[str, torch.Tensor], sensitivity: LossSensitivity
) -> list[Reader]:
    """weights: f[N, C] of the linears that read one input, by site."""
    found, visual = [], statistics.visual
    for site, weight in weights.items():
        wide = weight.float()
        if site in sensitivity.linears:
            of_visual, of_text = sensitivity.linears[site]
            costs = torch.where(visual, of_visual / visual.sum(), of_text / (~visual).sum())
        else:
            energy = (statistics.rows @ wide.T).square().sum(dim=-1).mean().clamp(min=1e-30)
            costs = torch.full_like(visual, 1.0, dtype=torch.float32) * sensitivity.features / energy / len(visual)
        found.append(Reader(wide, costs))
    return found


def input_cost(statistics: InputStatistics, linears: Sequence[Reader], scheme: ActivationScheme) -> float:
    """What rounding the inputs of these linears costs; at the best clip ratio if the scheme searches one."""
    ratios = RATIOS if scheme.clip_search else (scheme.clip_ratio,)
    rows, totals = statistics.rows, torch.zeros(len(ratios))
    squares = [_squares(linear.weight, len(ratios) * len(rows)) for linear in linears]
    for place, ratio in enumerate(ratios):
        error = round_trip(rows, scheme.kernel_group, ratio, scheme.bits) - rows
        totals[place] = sum(
            float(square(error) @ linear.costs) for square, linear in zip(squares, linears, strict=True)
        )
    return float(totals.min())


def weight_cost(statistics: InputStatistics, linears: Sequence[Reader], scheme: WeightScheme) -> float:
    """What rounding these weights to nearest costs: the relative error, times what the whole output would cost."""
    plain, total = scheme.model_copy(update={"solver": "rtn"}), 0.0
    for linear in linears:
        codes, scale = solve(linear.weight, statistics.moments, plain)
        whole = float((statistics.rows @ linear.weight.T).square().sum(dim=-1) @ linear.costs)
        total += output_error(linear.weight, codes, scale, statistics.moments) ** 2 * whole
    return total


def _squares(weights: torch.Tensor, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """f32[R, C] -> || W x ||^2: f32[R], for `count` rows x in all: by W, or by W^T W where that is less work."""
    outputs, channels = weights.shape
    if count * outputs <= channels * (outputs + count):
        return lambda rows: (rows @ weights.T).square().sum(dim=-1)
    gram = weights.T @ weights
    return lambda rows: ((rows @ gram) * rows).sum(dim=-1)
