"""Select the kept tokens: the highest scores of each row, in original order.

    I = sort(TopK(score, N))        ties: the lower index first

A batch is rectangular, so every row gets N slots; `valid` marks those within the row's own quota.

Source: QUOTA, equation 9 (arXiv 2604.17320).
"""

import torch
from torch import Tensor


def select_tokens(scores: Tensor, keep: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    """scores: f32[B, S], quota: i64[B] -> index: i64[B, keep] ascending, valid: bool[B, keep]."""
    ranked = torch.argsort(scores.contiguous(), dim=1, descending=True, stable=True)[:, :keep]
    index, rank = torch.sort(ranked, dim=1)
    return index, rank < quota[:, None]
