"""Profile of a decoder layer's visual tokens: attention concentration and redundancy, one number per sample."""

from __future__ import annotations

import torch

TOP = 10


def attention_mass(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float | None, visual: torch.Tensor
) -> float | None:
    """Share of the attention of text after the picture that falls on the ten most attended visual tokens.

    query: f[B, H, S, D]; key: f[B, Hkv, S, D]; mask: bool or float [B, 1, S, S] or None (causal); visual: bool[B, S].
    Mean over heads, text queries and rows; None if no text follows a picture.
    """
    following = (visual.cumsum(dim=1) > 0) & ~visual
    if not following.any():
        return None
    rows = following.any(dim=0).nonzero().flatten()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query[:, :, rows].float() @ key.float().transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    if mask is None:
        mask = visual.new_ones(visual.shape[1], visual.shape[1]).tril()[None, None]
    part = mask[:, :, rows]
    scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    weights = scores.softmax(dim=-1).nan_to_num().mean(dim=1)
    counts = following[:, rows].float()
    per_key = (weights * counts[:, :, None]).sum(dim=1) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    per_key = per_key.masked_fill(~visual, 0.0)
    return float(per_key.topk(min(TOP, per_key.shape[1]), dim=1).values.sum(dim=1).mean())


def pairwise_cosine(hidden: torch.Tensor, visual: torch.Tensor) -> float:
    """Mean cosine between different visual tokens of a row, mean over rows. hidden: f[B, S, C]; visual: bool[B, S]."""
    means = []
    for row, chosen in zip(hidden.float(), visual, strict=True):
        tokens = torch.nn.functional.normalize(row[chosen], dim=-1)
        count = tokens.shape[0]
        if count > 1:
            # The sum of all pairwise products is the squared norm of the sum.
            means.append((tokens.sum(dim=0).pow(2).sum() - count) / (count * (count - 1)))
    return float(torch.stack(means).mean()) if means else 0.0
