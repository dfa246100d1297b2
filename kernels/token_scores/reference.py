"""Score visual tokens by the quantized model's attention and by their quantization residual.

    inter_i     = 1/H sum_h sum_{j in T} A^h[j, i]        attention from text queries T
    magnitude_i = ||v_i||
    intra_i     = 1/H sum_h sum_{k in V} A^h[k, i]        attention from visual queries V
    residual_i  = ||Q(x_i) - x_i||                        Q: quantize_dynamic, after the rotation if asked; or / ||x_i||
    score_i     = sum over the four of weight * normalised metric

A = softmax(scale * Q K^T + mask), grouped-query. Text tokens score +inf, padding -inf, so that top-k always keeps the
former and drops the latter.

Source: QUOTA, equations 6-9 (arXiv 2604.17320). The paper does not specify the set T, the normalization, the tensor x
and the form of the residual: they are arguments. Channels with massive activations in some tokens mark attention sinks,
not content (arXiv 2503.03321): `sink` excludes them from magnitude and residual.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qpcompile.kernels.attention_kv.masking import masked_softmax, split_mask
from qpcompile.kernels.hadamard.reference import hadamard
from qpcompile.kernels.quantize_dynamic.reference import dequantize, quantize_dynamic
from qpcompile.kernels.token_scores.normalize import EPSILON, normalize_metric
from qpcompile.kernels.token_scores.settings import Attention, Settings, Tokens

AttentionMass = Callable[[Tensor, Tensor, Tensor | None, float, Tensor, Tensor], tuple[Tensor, Tensor]]


def attention_mass(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, valid: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention that each key gets from groups of queries, summed over the queries and averaged over the heads.

    q: f[B, H, S, D], k: f[B, Hkv, S, D], mask: f or bool [B | 1, 1 | H, S, S] or None for causal over `valid` keys,
    groups: bool[B, M, S], the queries of each group -> mass: f32[B, M, S], and the number of queries that see the key:
    f32[B, M, S].
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
    rounded: Tensor,
    attention: Attention[Tensor],
    tokens: Tokens[Tensor],
    settings: Settings,
    mass_of: AttentionMass = attention_mass,
) -> Tensor:
    """hidden: f[B, S, C], rounded: f[B, S, D] -> f32[B, S].

    mass_of: the attention implementation, for a blocked one.
    """
    valid, weights = tokens.valid, settings.weights
    counted = tokens.visual & valid
    # A metric of weight 0 costs nothing: no query row is computed for it.
    text = tokens.queries & valid & (weights[0] != 0)
    pictures = counted & (weights[2] != 0)
    groups = torch.stack([text, pictures], dim=1)
    mass, seen_by = mass_of(attention.q, attention.k, attention.mask, attention.scale, valid, groups)
    inter, intra = mass.unbind(1)
    if settings.intra_mean:
        intra = intra / seen_by[:, 1].clamp(min=1)
    nothing = torch.zeros_like(inter)
    magnitude = without_sinks(hidden.float(), counted, settings.sink).norm(dim=-1) if weights[1] else nothing
    lost = nothing
    if weights[3]:
        values = without_sinks(rounded.float(), counted, settings.sink)
        lost = residual(
            values, settings.rotate, settings.group_size, settings.clip_ratio, settings.bits, settings.relative
        )
    scores = nothing
    for weight, metric in zip(weights, (inter, magnitude, intra, lost), strict=True):
        if weight:
            normal = normalize_metric(metric, counted, settings.normalize, settings.low, settings.high)
            scores = scores + weight * normal
    others = torch.where(valid, torch.inf, -torch.inf)
    return torch.where(counted, scores, others)


def without_sinks(values: Tensor, counted: Tensor, sink: float) -> Tensor:
    """values: f32[B, S, C], counted: bool[B, S] -> f32[B, S, C] with 0 in the channels of attention sinks.

    Those are the channels whose largest magnitude over the row's counted tokens is more than `sink` times that of the
    median channel (the upper one of an even number).
    """
    if not sink:
        return values
    peak = values.abs().masked_fill(~counted[..., None], 0.0).amax(1)
    middle = peak.sort(dim=1).values[:, peak.shape[1] // 2, None]
    return values.masked_fill((peak > sink * middle)[:, None], 0.0)


def residual(values: Tensor, rotate: bool, group_size: int, clip_ratio: float, bits: int, relative: bool) -> Tensor:
    """values: f32[B, S, C] -> f32[B, S], the L2 norm of the rounding error, or its ratio to the token's norm."""
    if rotate:
        values = hadamard(values.double()).float()  # in float64, as other selection: back ends rank alike
    codes, scale = quantize_dynamic(values, group_size, clip_ratio, bits)
    lost = (dequantize(codes, scale) - values).norm(dim=-1)
    return lost / (values.norm(dim=-1) + EPSILON) if relative else lost
