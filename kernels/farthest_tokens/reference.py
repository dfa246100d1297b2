"""Rank tokens by greedy max-min diversity (farthest-point sampling): each pick is farthest from the earlier ones.

    distance(i, j) = 1 - cos(f_i, f_j)
    first:   the token whose nearest other token is farthest
    next:    the token whose nearest picked token is farthest        ties: the lower index
    priority of the token picked in iteration t = S - t;   of any other = 0

The first T picks are the result for a budget of T. Cosines are float64 and compared in float32, so that equal tokens
tie under any summation order.

Source: DivPrune (arXiv 2503.02175), section 3.
"""

import torch
from torch import Tensor

from qpcompile.kernels.dpp_select.reference import largest_turn, pick_row, unit_rows


def farthest_tokens(features: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    """features: f[B, S, C], counted: bool[B, S], budget: i64[B] -> f32[B, S]."""
    unit = unit_rows(features)
    near = nearest_cosine(unit, counted)
    free = counted
    priority = torch.zeros(counted.shape, device=features.device)
    length = counted.shape[1]
    for turn in range(largest_turn(counted, budget)):
        best = torch.where(free, -near.float(), -torch.inf).argmax(1, keepdim=True)
        picks = free.gather(1, best)
        free = free.scatter(1, best, False)
        priority = priority.scatter(1, best, torch.where(picks, float(length - turn), priority.gather(1, best)))
        cosine = (unit @ pick_row(unit, best)).squeeze(2)
        near = cosine if turn == 0 else torch.maximum(near, cosine)
    return priority


def nearest_cosine(unit: Tensor, counted: Tensor) -> Tensor:
    """unit: f64[B, S, C], counted: bool[B, S] -> f64[B, S]: the largest cosine with another counted token.

    Row by row, so that one [S, S] is in memory at a time.
    """
    rows = []
    for vectors, mask in zip(unit, counted, strict=True):
        cosines = (vectors @ vectors.mT).masked_fill(~mask[None, :], -torch.inf)
        rows.append(cosines.fill_diagonal_(-torch.inf).amax(1))
    return torch.stack(rows)
