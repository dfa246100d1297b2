"""Score every visual token by what the quantized model attends to and by what 4 bits lose.

    inter_i     = 1/H sum_h sum_{j in T} A^h[j, i]        attention from text queries T
    magnitude_i = ||v_i||
    intra_i     = 1/H sum_h sum_{k in V} A^h[k, i]        attention from visual queries V
    residual_i  = ||Q(v_i) - v_i||                        Q: symmetric int4 per token, after the rotation if asked
    score_i     = sum over the four of weight * normalised metric

A = softmax(scale * Q K^T + mask), grouped-query. Text tokens score +inf, padding -inf, so that top-k keeps the first
and drops the last whatever the picture holds.

Source: QUOTA, equations 6-9 (arXiv 2604.17320). The set T, the normalisation and the space of the residual are not
given there: they are arguments.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qpcompile.kernels.attention_kv4.masking import masked_softmax, split_mask
from qpcompile.kernels.hadamard.reference import hadamard
from qpcompile.kernels.quantize_int4.reference import dequantize_int4, quantize_int4
from qpcompile.kernels.token_scores.normalize import normalize_metric

QUERIES = ("after_image", "last")
AttentionMass = Callable[[Tensor, Tensor, Tensor | None, float, Tensor, Tensor], tuple[Tensor, Tensor]]


def attention_mass(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, valid: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention that each key gets from groups of queries, summed over the queries and averaged over the heads.

    q: f[B, H, S, D], k: f[B, Hkv, S, D], mask: f or bool [B | 1, 1 | H, S, S] or None for causal over `valid` keys,
    groups: bool[B, M, S], the queries of each group -> mass: f32[B, M, S], and how many queries see it: f32[B, M, S].
    """
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril() & valid[:, None, None]
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    probabilities = masked_softmax(q.float() @ keys.mT * scale, mask)
    sees = split_mask(mask)[0].float().mean(1)
    chosen = groups.float()
    return chosen @ probabilities.mean(1), chosen @ sees


def token_scores(
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    visual: Tensor,
    valid: Tensor,
    weights: Sequence[float],
    normalize: str,
    low: float,
    high: float,
    queries: str,
    intra_mean: bool,
    rotate: bool,
    mass_of: AttentionMass = attention_mass,
) -> Tensor:
    """hidden: f[B, S, C], q: f[B, H, S, D], k: f[B, Hkv, S, D], visual, valid: bool[B, S] -> f32[B, S].

    mask as in attention_mass; weights: of (inter, magnitude, intra, residual); low, high: percentiles.
    mass_of: what computes the attention, for a path that does so in pieces.
    """
    counted = visual & valid
    # A metric of weight 0 costs nothing: no query row is asked for it.
    text = text_queries(visual, valid, queries) & (weights[0] != 0)
    pictures = counted & (weights[2] != 0)
    mass, seen_by = mass_of(q, k, mask, scale, valid, torch.stack([text, pictures], dim=1))
    inter, intra = mass.unbind(1)
    if intra_mean:
        intra = intra / seen_by[:, 1].clamp(min=1)
    values = hidden.float()
    metrics = (inter, values.norm(dim=-1), intra, residual(values, rotate) if weights[3] else torch.zeros_like(inter))
    scores = torch.zeros_like(inter)
    for weight, metric in zip(weights, metrics, strict=True):
        if weight:
            scores = scores + weight * normalize_metric(metric, counted, normalize, low, high)
    others = torch.where(valid, torch.inf, -torch.inf)
    return torch.where(counted, scores, others)


def text_queries(visual: Tensor, valid: Tensor, queries: str) -> Tensor:
    """visual, valid: bool[B, S] -> bool[B, S], the rows whose attention counts for inter.

    after_image: valid tokens that are not visual, after the row's first visual one. last: the last valid token.
    """
    if queries == "last":
        return valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    return valid & ~visual & ((visual & valid).cumsum(1) > 0)


def residual(values: Tensor, rotate: bool) -> Tensor:
    """values: f32[B, S, C] -> f32[B, S], the L2 norm of what symmetric int4 with one scale per token loses."""
    if rotate:
        values = hadamard(values)
    return (dequantize_int4(*quantize_int4(values)) - values).norm(dim=-1)
