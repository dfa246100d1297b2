"""Rank tokens by relevance and diversity: greedy MAP inference of a determinantal point process (DPP).

    u_i  = f_i / ||f_i||,   L = diag(r) U U^T diag(r),   d2_i = L_ii
    iteration t = 0, 1, ..:   j = argmax d2            ties: the lower index
                         e = (L_j - sum_{s<t} c_s[j] c_s) / sqrt(d2_j)
                         c_t = e,   d2 -= e^2,    j is out
    priority of the token picked in iteration t = S - t;   of one never picked = r_i - max r <= 0

Each iteration picks the token that increases det(L) of the picked set most; the first T picks are the result for a
budget of T. A row stops when max d2 <= 1e-10 of the largest L_ii: the remaining tokens lie in the span of the picked
ones, and are ordered by r.

Everything is float64, but d2 is compared in float32: equal tokens tie under any summation order.

Source: CDPruner (arXiv 2506.10967), section 3; the recursion is that of "Fast Greedy MAP Inference for Determinantal
Point Process" (arXiv 1709.05135), section 3. The stopping rule is ours.
"""

import torch
from torch import Tensor

RANK_FLOOR = 1e-10
TINY = 1e-30


def dpp_select(features: Tensor, relevance: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    """features: f[B, S, C], relevance: f32[B, S] >= 0, counted: bool[B, S], budget: i64[B] -> f32[B, S].

    Iterates up to the largest budget. Tokens that are not counted get 0.
    """
    unit = unit_rows(features)
    weight = torch.where(counted, relevance.double(), 0.0)
    gain = torch.where(counted, weight.square() * unit.square().sum(2), -torch.inf)
    floor = RANK_FLOOR * gain.amax(1, keepdim=True)
    top = torch.where(counted, relevance, -torch.inf).amax(1, keepdim=True)
    priority = torch.where(counted, relevance - top, 0.0)
    length, turns = counted.shape[1], largest_turn(counted, budget)
    basis = gain.new_zeros(turns, *gain.shape)
    for turn in range(turns):
        best = gain.float().argmax(1, keepdim=True)
        peak = gain.gather(1, best)
        picks = peak > floor
        row = (unit @ pick_row(unit, best)).squeeze(2) * weight * weight.gather(1, best)
        before = basis[:turn].gather(2, best.expand(turn, -1, 1))
        part = (row - (before * basis[:turn]).sum(0)) / peak.clamp(min=TINY).sqrt()
        basis[turn] = torch.where(picks, part, 0.0)
        gain = (gain - basis[turn].square()).scatter(1, best, torch.where(picks, -torch.inf, peak))
        priority = priority.scatter(1, best, torch.where(picks, float(length - turn), priority.gather(1, best)))
    return priority


def unit_rows(features: Tensor) -> Tensor:
    """f[B, S, C] -> f64[B, S, C], each row divided by its L2 norm; zero rows are unchanged."""
    wide = features.double()
    return wide / wide.norm(dim=2, keepdim=True).clamp(min=TINY)


def pick_row(unit: Tensor, index: Tensor) -> Tensor:
    """unit: f[B, S, C], index: i64[B, 1] -> f[B, C, 1]."""
    return unit.gather(1, index[:, :, None].expand(-1, 1, unit.shape[2])).mT


def largest_turn(counted: Tensor, budget: Tensor) -> int:
    """The number of iterations of the row with the largest budget."""
    return max(0, int(torch.minimum(budget, counted.sum(1)).max())) if len(budget) else 0
