"""Normalize a metric of visual tokens to 0..1 within its row, so that metrics of different units can be added.

    percentile   clip((m - P_low) / (P_high - P_low + 1e-6), 0, 1)
    mad          (clip((m - median) / (1.4826 * MAD + 1e-6), -3, 3) + 3) / 6
    rank         (zero-based rank, ties share their mean rank) / (n - 1)
    none         m itself, for scores of one metric

Percentiles interpolate linearly, over the row's n counted tokens only.

Source: QUOTA, equation 7 (arXiv 2604.17320), which specifies percentile clipping but not the percentiles.
"""

import torch
from torch import Tensor

METHODS = ("percentile", "mad", "rank", "none")
EPSILON = 1e-6
# The standard deviation of a normal distribution in units of its median absolute deviation.
MAD_TO_SIGMA = 1.4826
LIMIT = 3.0


def normalize_metric(metric: Tensor, counted: Tensor, method: str, low: float, high: float) -> Tensor:
    """metric: f32[B, S], counted: bool[B, S] -> f32[B, S]; entries that are not counted are undefined."""
    if method == "none":
        return metric
    if method == "percentile":
        bottom = masked_percentile(metric, counted, low)
        top = masked_percentile(metric, counted, high)
        return torch.clamp((metric - bottom) / (top - bottom + EPSILON), 0, 1)
    if method == "mad":
        distance = metric - masked_percentile(metric, counted, 50)
        sigma = MAD_TO_SIGMA * masked_percentile(distance.abs(), counted, 50) + EPSILON
        return (torch.clamp(distance / sigma, -LIMIT, LIMIT) + LIMIT) / (2 * LIMIT)
    return mean_rank(metric, counted) / (counted.sum(1, keepdim=True) - 1).clamp(min=1)


def masked_percentile(metric: Tensor, counted: Tensor, percent: float) -> Tensor:
    """metric: f32[B, S], counted: bool[B, S] -> f32[B, 1]; infinity in a row without counted tokens."""
    ordered = torch.where(counted, metric, torch.inf).sort(dim=1).values
    last = (counted.sum(1, keepdim=True) - 1).clamp(min=0)
    position = last.float() * (percent / 100)
    below = position.floor().long()
    value = ordered.gather(1, below)
    above = ordered.gather(1, torch.minimum(below + 1, last))
    return value + (above - value) * (position - below)


def mean_rank(metric: Tensor, counted: Tensor) -> Tensor:
    """metric: f32[B, S], counted: bool[B, S] -> f32[B, S]: how many counted tokens are smaller, ties by half."""
    ordered = torch.where(counted, metric, torch.inf).sort(dim=1).values
    smaller = torch.searchsorted(ordered, metric.contiguous(), right=False)
    not_larger = torch.searchsorted(ordered, metric.contiguous(), right=True)
    return (smaller + not_larger - 1) / 2
