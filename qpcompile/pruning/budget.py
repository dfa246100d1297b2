"""QUOTA's token budget: keep ratios per decoder layer, as pure functions of measurements.

    S_l   = median_x ||x_q - x|| / (||x|| + eta)                        sensitivity of layer l
    S~_l  = clip((S_l - P10) / (P90 - P10), 0.1, 0.9)                   percentiles over the candidate layers
    pi_i  = exp((1 - S~_i) / tau) / sum_j exp((1 - S~_j) / tau)         share of the drop that falls on layer i
    r_i   = max(keep, 1 - (1 - keep) * sum_{j <= i} pi_j)               keep ratio after layer i
    K_i   = ceil(r_i * V)                                               of V visual tokens

The shares sum to 1, so the last ratio is always `keep`: sensitivity determines the intermediate ratios only.

Source: QUOTA, equations 1-5 and the choice of candidate layers (arXiv 2604.17320). The paper gives neither tau nor the
thresholds of the candidate rule: the defaults reproduce its figures 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qpcompile.errors import PlanError
from qpcompile.ir.measurements import Measurement

# A ratio is stored in millionths: a graph can multiply and divide it in int64 for up to 9e12 visual tokens, and
# ten-thousandths would miss one of the paper's counts (230.009 of 576 is 231 tokens).
DENOMINATOR = 1_000_000

DEVIATIONS: Measurement[dict[int, list[float]]] = Measurement("deviations")
"""Of each layer, one number for each calibration sample."""


def relative_deviation(quantized: ArrayLike, full: ArrayLike, eta: float = 1e-6) -> float:
    """||quantized - full|| / (||full|| + eta) for one sample; both f[..., C], L2 norms over all elements."""
    reference = np.asarray(full, dtype=np.float64)
    difference = np.asarray(quantized, dtype=np.float64) - reference
    return float(np.linalg.norm(difference) / (np.linalg.norm(reference) + eta))


def sensitivity(deviations: ArrayLike) -> tuple[float, ...]:
    """Equation 1: the median over samples of each layer's deviation; deviations: f[samples, layers]."""
    table = np.asarray(deviations, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise PlanError(
            f"sensitivity needs a table of samples x layers, got shape {table.shape}",
            do="measure at least one calibration sample on at least one layer",
        )
    return tuple(float(value) for value in np.median(_finite(table, "deviations"), axis=0))


def normalize_sensitivity(
    sensitivities: Sequence[float], low: float = 10.0, high: float = 90.0, clip: tuple[float, float] = (0.1, 0.9)
) -> tuple[float, ...]:
    """Equation 2; if all candidate layers are equally sensitive, each gets the middle of `clip`."""
    values = _finite(np.asarray(sensitivities, dtype=np.float64), "sensitivities")
    if values.ndim != 1 or not values.size:
        raise PlanError("no layer to normalise the sensitivity of", do="name at least one candidate layer")
    if not 0 <= low < high <= 100 or not clip[0] <= clip[1]:
        raise PlanError(
            f"percentiles ({low}, {high}) and bounds {clip} must each be (lower, upper)",
            where="tokens.sensitivity_percentiles, tokens.sensitivity_clip",
            do="write the lower number first; percentiles lie in 0..100",
        )
    bottom, top = (float(value) for value in np.percentile(values, [low, high], method="linear"))
    if top == bottom:
        return (sum(clip) / 2,) * values.size
    return tuple(float(np.clip((value - bottom) / (top - bottom), *clip)) for value in values)


def drop_shares(normalized: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Equation 3: shares of the drop, summing to 1; a less sensitive layer gets the larger share."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise PlanError(
            f"the temperature is {temperature}, which distributes no budget",
            where="tokens.temperature",
            do="give a number above 0; 1.25 reproduces the paper's schedule",
        )
    logits = (1 - _finite(np.asarray(normalized, dtype=np.float64), "normalised sensitivities")) / temperature
    weights = np.exp(logits - logits.max())
    return tuple(float(weight) for weight in weights / weights.sum())


def keep_ratios(shares: Sequence[float], keep: float) -> tuple[float, ...]:
    """Equation 4: non-increasing, and exactly `keep` at the last layer."""
    if not 0 < keep <= 1:
        raise PlanError(f"keep is {keep}", where="tokens.keep", do="give a share above 0 and at most 1")
    dropped = (1 - keep) * np.cumsum(np.asarray(shares, dtype=np.float64))
    ratios = [float(max(keep, 1 - drop)) for drop in dropped]
    return (*ratios[:-1], float(keep))


def tokens_kept(ratio: float, visual: int) -> int:
    """Equation 5 with a guard of one millionth of a token, in [1, visual]: 0.3 of 10 is 3 tokens, not 4."""
    return min(max(1, math.ceil(ratio * visual - 1e-6)), visual)


def ratio_fraction(ratio: float) -> tuple[int, int]:
    """The ratio as (numerator, denominator), rounded down to a millionth, but to 0 only if it is 0.

    Rounding down keeps integer products integer (2/3 of 576 is 384, not 385); the tolerance is a thousandth of a
    millionth, since 0.29 * 1_000_000 may be just below the integer.
    """
    if not 0 <= ratio <= 1:
        raise PlanError(f"the keep ratio {ratio} is not from 0 to 1", do="compute it with keep_ratios")
    return (0, DENOMINATOR) if ratio == 0 else (max(1, math.floor(ratio * DENOMINATOR + 1e-3)), DENOMINATOR)


def tokens_by_fraction(numerator: int, denominator: int, visual: int) -> int:
    """ceil(visual * numerator / denominator) in integer arithmetic, as a graph evaluates it."""
    return (visual * numerator + denominator - 1) // denominator


@dataclass(frozen=True)
class Candidates:
    """Layers after which tokens may be cut, and the conditions that no layer met with the others, in words."""

    layers: tuple[int, ...]
    waived: tuple[str, ...] = ()


def candidate_layers(
    mass_median: Sequence[float],
    mass_iqr: Sequence[float],
    cosine: Sequence[float],
    *,
    concentration_floor: float = 0.5,
    iqr_ceiling: float = 0.5,
    cosine_ceiling: float = 0.5,
    tail_fraction: float = 0.1,
    max_candidates: int = 5,
) -> Candidates:
    """Layers after which tokens may be cut: the first consecutive ones with concentrated attention and diverse tokens.

    Per layer, over the calibration samples: median and interquartile range of the top-10 attention mass from text
    queries to visual tokens, and the median pairwise cosine of visual tokens. The paper's rule: no layer whose
    concentration is low or unstable, an early contiguous range whose tokens are diverse, none of the last layers. What
    it leaves open is ours: the floor is a share of the largest mass, `iqr_ceiling` a share of the layer's own mass,
    `cosine_ceiling` a share of the way from the smallest to the largest cosine, `tail_fraction` a share of all layers,
    at most `max_candidates` are taken, and where no layer satisfies all conditions they are waived one by one:
    stability, then diversity, then concentration. The last layers are never taken.
    """
    mass, spread, likeness = (
        _finite(np.asarray(values, dtype=np.float64), name)
        for values, name in ((mass_median, "attention masses"), (mass_iqr, "mass ranges"), (cosine, "cosines"))
    )
    if mass.ndim != 1 or not mass.shape == spread.shape == likeness.shape or not mass.size:
        raise PlanError(
            f"the layer profile has {mass.size} masses, {spread.size} ranges and {likeness.size} cosines",
            do="give one number of each kind per decoder layer",
        )
    floor = concentration_floor * mass.max()
    ceiling = likeness.min() + cosine_ceiling * (likeness.max() - likeness.min())
    late = np.arange(mass.size) >= mass.size - math.ceil(tail_fraction * mass.size)
    excluded = {
        f"iqr_ceiling (range above {iqr_ceiling} x mass)": spread > iqr_ceiling * mass,
        f"cosine_ceiling (cosine above {ceiling:.4g})": likeness > ceiling,
        f"concentration_floor (mass below {floor:.4g})": mass < floor,
    }
    if late.all() or max_candidates < 1:
        raise PlanError(
            f"no decoder layer is left to cut after (at most {max_candidates} wanted)",
            where=f"tail_fraction (last {int(late.sum())} of {mass.size} layers)",
            do="lower tokens.tail_fraction, or name the layers in tokens.candidate_layers",
        )
    waived: list[str] = []
    while np.logical_or.reduce([late, *excluded.values()]).all():
        name, out = next(iter(excluded.items()))
        del excluded[name]
        if (out & ~late).any():
            waived.append(f"{name} excluded layers {np.flatnonzero(out).tolist()}")
    allowed = np.flatnonzero(~np.logical_or.reduce([late, *excluded.values()]))
    run = allowed[allowed - allowed[0] == np.arange(allowed.size)]
    return Candidates(tuple(int(layer) for layer in run[:max_candidates]), tuple(waived))


def _finite(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        raise PlanError(f"the {name} hold NaN or infinity", do="look for an overflow in the calibration run")
    return values
