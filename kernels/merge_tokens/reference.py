"""Merge dropped tokens, or the nearest tokens, into kept tokens by key similarity.

    similarity s_ij = cosine of the keys of i and j
    nearest = 0:  y_i = x_i + mean of x_j over the sources j whose most similar target is i
    nearest = n:  y_i = x_i + sum of w_j x_j over the n sources j != i most similar to i
    for targets i; every other token is unchanged. Ties to the lower index.

Sums are float64, rounded once, and cosines are compared in float32, so that the summation order does not matter.

Source: VisionZip (arXiv 2412.04467), section 3.2, for nearest = 0; LLaVA-PruMerge (arXiv 2403.15388), section 3.2, for
nearest = n.
"""

import torch
from torch import Tensor


def merge_tokens(
    hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int
) -> Tensor:
    """hidden: f[B, S, C], keys: f[B, S, K], weights: f32[B, S], targets, sources: bool[B, S] -> as hidden.

    weights are read with nearest > 0 only.
    """
    values, units = hidden.double(), torch.nn.functional.normalize(keys.double(), dim=-1)
    similarity = (units @ units.mT).float()
    if nearest:
        shares = _of_nearest(similarity, sources, nearest).double() * weights[:, None]
    else:
        joined = _of_closest(similarity, targets, sources).double()
        shares = joined / joined.sum(dim=2, keepdim=True).clamp(min=1)
    return torch.where(targets[..., None], values + shares @ values, values).to(hidden.dtype)


def _of_closest(similarity: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """bool[B, S, S]: whether the column's token is a source whose closest target is the row's token."""
    closest = similarity.masked_fill(~targets[:, :, None], -torch.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, closest, True) & sources[:, None]


def _of_nearest(similarity: Tensor, sources: Tensor, nearest: int) -> Tensor:
    """bool[B, S, S]: whether the column's token is among the `nearest` sources of the row's token."""
    itself = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    allowed = sources[:, None] & ~itself
    order = similarity.masked_fill(~allowed, -torch.inf).argsort(dim=2, descending=True, stable=True)[..., :nearest]
    return torch.zeros_like(allowed).scatter_(2, order, True) & allowed
