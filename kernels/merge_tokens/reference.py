"""Add to the tokens that stay what is left of the tokens that go, or of their neighbours.

    similarity s_ij = cosine of the keys of i and j
    nearest = 0:  y_i = x_i + mean of x_j over the sources j whose most similar target is i
    nearest = n:  y_i = x_i + sum of w_j x_j over the n sources j != i most similar to i
    for targets i; every other token stays as it is. Ties to the lower index.

Source: VisionZip (arXiv 2412.04467), section 3.2, for nearest = 0; LLaVA-PruMerge (arXiv 2403.15388), section 3.2, for
nearest = n.
"""

import torch
from torch import Tensor


def merge_tokens(
    hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int
) -> Tensor:
    """hidden: f[B, S, C], keys: f[B, S, K], weights: f32[B, S], targets, sources: bool[B, S] -> as hidden.

    weights are read with nearest > 0 only. Computed in float32.
    """
    values, units = hidden.float(), torch.nn.functional.normalize(keys.float(), dim=-1)
    similarity = units @ units.mT
    if nearest:
        shares = _shares_of_nearest(similarity, sources, nearest) * weights[:, None]
    else:
        shares = _shares_of_means(similarity, targets, sources)
    return torch.where(targets[..., None], values + shares @ values, values).to(hidden.dtype)


def _shares_of_means(similarity: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """What each target (rows) takes of each source (columns), f32[B, S, S]: 1 / count of its sources."""
    closest = similarity.masked_fill(~targets[:, :, None], -torch.inf).argmax(dim=1, keepdim=True)
    joined = torch.zeros_like(similarity).scatter_(1, closest, 1.0) * sources[:, None]
    return joined / joined.sum(dim=2, keepdim=True).clamp(min=1)


def _shares_of_nearest(similarity: Tensor, sources: Tensor, nearest: int) -> Tensor:
    """1 for the `nearest` sources (columns) most similar to each token (rows), f32[B, S, S]."""
    itself = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    similarity = similarity.masked_fill(~sources[:, None] | itself, -torch.inf)
    order = similarity.argsort(dim=2, descending=True, stable=True)[..., :nearest]
    return torch.zeros_like(similarity).scatter_(2, order, 1.0) * (similarity > -torch.inf)
