"""The output error of linears on calibration tokens, by the rounding of their inputs or of their weights.

    inputs     sum over modalities of  mean over tokens of || W (Q_r(x) - x) ||^2,    scale of Q_r = r max|x| / h
    weights    sum over linears of  tr((W - Q) H (W - Q)^T) / tr(W H W^T),            H = sum x x^T, Q to nearest

Visual and text tokens are averaged separately: text tokens are few, but the answer is generated from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qpcompile.calibration.statistics import InputStatistics
from qpcompile.quantization.fake_quant import round_trip
from qpcompile.quantization.solve import output_error, solve
from qpcompile.recipe.quantize import ActivationScheme, WeightScheme

RATIOS = tuple(1 - 0.03 * step for step in range(15))


def rounding_errors(
    statistics: InputStatistics, weights: torch.Tensor, scheme: ActivationScheme, ratios: Sequence[float]
) -> list[float]:
    """weights: f[N, C] of all linears that read the input -> the error with each clip ratio."""
    rows = statistics.rows
    square, shares = _squares(weights.float(), len(ratios) * len(rows)), _shares(statistics)
    errors = (round_trip(rows, scheme.kernel_group, ratio, scheme.bits) - rows for ratio in ratios)
    return [float(square(error) @ shares) for error in errors]


def relative_input_error(
    statistics: InputStatistics, weights: Sequence[torch.Tensor], scheme: ActivationScheme
) -> float:
    """The error of rounded inputs over the energy of the output, summed over the linears; at the best clip ratio if the
    scheme searches one. weights: f[N, C] of each linear.
    """
    rows, shares = statistics.rows, _shares(statistics)
    # One matrix for all linears: each one's outputs have the energy 1.
    parts = [weight.float() for weight in weights]
    energies = [float((rows @ part.T).square().sum(dim=-1) @ shares) for part in parts]
    scaled = [part / max(energy, 1e-30) ** 0.5 for part, energy in zip(parts, energies, strict=True)]
    return min(rounding_errors(statistics, torch.cat(scaled), scheme, RATIOS if scheme.clip_search else _own(scheme)))


def relative_weight_error(
    statistics: InputStatistics | None, weights: Sequence[torch.Tensor], scheme: WeightScheme
) -> float:
    """The error of weights rounded to nearest over the energy of the output, summed over the linears."""
    plain = scheme.model_copy(update={"solver": "rtn"})
    moments = None if statistics is None else statistics.moments
    return sum(output_error(weight, *solve(weight, moments, plain), moments) ** 2 for weight in weights)


def _own(scheme: ActivationScheme) -> tuple[float, ...]:
    return (scheme.clip_ratio,)


def _shares(statistics: InputStatistics) -> torch.Tensor:
    """f32[R]: the share of each stored token in the mean of its modality."""
    return torch.where(statistics.visual, 1 / statistics.visual.sum(), 1 / (~statistics.visual).sum())


def _squares(weights: torch.Tensor, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """f32[R, C] -> || W x ||^2: f32[R], for `count` rows x in all: by W, or by W^T W where that is less work."""
    outputs, channels = weights.shape
    if count * outputs <= channels * (outputs + count):
        return lambda rows: (rows @ weights.T).square().sum(dim=-1)
    gram = weights.T @ weights
    return lambda rows: ((rows @ gram) * rows).sum(dim=-1)
