"""Score each visual token by its 4-bit quantization error, relative to the other visual tokens of its row.

    minmax(m)          (m - min + 1e-8) / (max - min + 1e-8) over the row's counted tokens
    E_i, by groups     ||v_i - v^_i||,  v^_ij = round(v_ij / (s + 1e-8)) s,  s = max|v| / 7 of the group of channels
    R_i                max_j v_ij - min_j v_ij

    complex            1/2 minmax(E) + 1/2 minmax(R)          the method; the others are its ablations
    complex_l1         1/2 E / sum E + 1/2 R / sum R
    complex_mul        minmax(E R)
    l2_norm, l1_norm, l_inf, variance, dynamic_range          minmax of that of v_i
    quant_error        minmax(E) with one group per token; quant_error_group with groups of `group_size`
    quant_error_clip   with one group, clipped at the 99th percentile of |v_i| instead of the maximum

A group size above the width is the width; if it does not divide the width the last group is smaller. Computed in
float64.

Source: QAPruner (arXiv 2604.02816), section 3, and the metrics of its ablation; the percentile's interpolation and the
smaller last group are ours.
"""

from typing import get_args

import torch
from torch import Tensor

from qpcompile.kernels.text_relevance.reference import rescale
from qpcompile.recipe.tokens import Metric

MARGIN = 1e-8
LARGEST_CODE = 7
CLIP_SHARE = 0.99
METRICS: tuple[str, ...] = get_args(Metric)


def quantization_risk(features: Tensor, counted: Tensor, metric: str, group_size: int) -> Tensor:
    """features: f[B, S, C], counted: bool[B, S] -> f32[B, S] from 0 to 1; 0 where a token is not counted."""
    v = features.double()
    if metric in ("complex", "complex_l1"):
        relative = _minmax if metric == "complex" else _share
        parts = [relative(each, counted) for each in (group_error(v, group_size), _range(v))]
        return ((parts[0] + parts[1]) / 2).float()
    return _minmax(_measure(v, metric, group_size), counted).float()


def _measure(v: Tensor, metric: str, group_size: int) -> Tensor:
    """v: f64[B, S, C] -> f64[B, S]."""
    if metric == "complex_mul":
        return group_error(v, group_size) * _range(v)
    if metric == "quant_error_group":
        return group_error(v, group_size)
    if metric == "quant_error":
        return group_error(v, v.shape[2])
    if metric == "quant_error_clip":
        return _clipped_error(v)
    if metric == "dynamic_range":
        return _range(v)
    if metric == "variance":
        return v.var(dim=2, correction=0)
    return v.norm(p={"l2_norm": 2, "l1_norm": 1, "l_inf": torch.inf}[metric], dim=2)


def group_error(v: Tensor, group_size: int) -> Tensor:
    """v: f64[B, S, C] -> f64[B, S], the L2 norm of the 4-bit rounding error with one scale per group."""
    size = min(group_size, v.shape[2])
    # Zero padding changes neither the scale of the last group nor its error.
    groups = torch.nn.functional.pad(v, (0, -v.shape[2] % size)).unflatten(2, (-1, size))
    return _rounding_error(groups, groups.abs().amax(3, keepdim=True)).flatten(2).norm(dim=2)


def _clipped_error(v: Tensor) -> Tensor:
    ordered = v.abs().sort(dim=2).values
    below, above, part = clip_position(v.shape[2])
    top = ordered[..., below, None] + (ordered[..., above, None] - ordered[..., below, None]) * part
    return (v - _rounded(torch.minimum(torch.maximum(v, -top), top), top)).norm(dim=2)


def clip_position(width: int) -> tuple[int, int, float]:
    """The two zero-based ranks around the percentile, and the interpolation weight of the second."""
    position = CLIP_SHARE * (width - 1)
    return int(position), min(int(position) + 1, width - 1), position - int(position)


def _rounding_error(v: Tensor, top: Tensor) -> Tensor:
    return v - _rounded(v, top)


def _rounded(v: Tensor, top: Tensor) -> Tensor:
    scale = top / LARGEST_CODE
    return (v / (scale + MARGIN)).round() * scale


def _range(v: Tensor) -> Tensor:
    return v.amax(2) - v.amin(2)


def _minmax(values: Tensor, counted: Tensor) -> Tensor:
    return rescale(values, counted, MARGIN)


def _share(values: Tensor, counted: Tensor) -> Tensor:
    own = torch.where(counted, values, 0.0)
    return own / (own.sum(1, keepdim=True) + MARGIN)
