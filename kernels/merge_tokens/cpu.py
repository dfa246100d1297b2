"""CPU kernel of merge_tokens: similarities of targets to sources only, a few rows of the reference's [S, S] matrix."""

import torch
from torch import Tensor

from qpcompile.kernels.merge_tokens.rule import RULE


@RULE.checked
def merge_tokens(
    hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int
) -> Tensor:
    """Shapes as in reference.py."""
    y = hidden.clone(memory_format=torch.contiguous_format)
    units = torch.nn.functional.normalize(keys.double(), dim=-1)
    for row in range(hidden.shape[0]):
        into, of = targets[row].nonzero().squeeze(1), sources[row].nonzero().squeeze(1)
        if len(into) and len(of):
            similarity = (units[row, into] @ units[row, of].T).float()
            if nearest:
                shares = _of_nearest(similarity, into[:, None] == of, nearest) * weights[row, of]
            else:
                shares = _means(similarity)
            y[row, into] = (hidden[row, into].double() + shares @ hidden[row, of].double()).to(y.dtype)
    return y


def _means(similarity: Tensor) -> Tensor:
    """similarity: f32[targets, sources] -> f64[targets, sources]."""
    closest = similarity.argmax(dim=0, keepdim=True)
    joined = torch.zeros_like(similarity, dtype=torch.float64).scatter_(0, closest, 1.0)
    return joined / joined.sum(dim=1, keepdim=True).clamp(min=1)


def _of_nearest(similarity: Tensor, itself: Tensor, nearest: int) -> Tensor:
    """similarity: f32[targets, sources], itself: bool, where both are one token -> f64[targets, sources], 0 or 1."""
    order = similarity.masked_fill(itself, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :nearest]
    return torch.zeros_like(similarity, dtype=torch.float64).scatter_(1, order, 1.0).masked_fill_(itself, 0.0)
