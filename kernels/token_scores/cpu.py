"""CPU kernel of token_scores, blocked over the query rows that a metric needs: no [S, S] scores are materialized.

Attention of bfloat16 queries and keys runs on AMX tiles (amx.inc) if the processor has them, else in torch. Within a
block the softmax is never normalized explicitly: the sum over rows r of group_r / (H * denominator_r) * exp(..)_r is
one matrix product over heads and rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qpcompile.kernels.attention.cpu import on_tiles
from qpcompile.kernels.attention_kv.masking import split_mask
from qpcompile.kernels.native import library as native
from qpcompile.kernels.token_scores import reference
from qpcompile.kernels.token_scores.rule import RULE
from qpcompile.kernels.token_scores.settings import Attention, Settings, Tokens

# Scores in memory at once, 8 MiB of float32: about the cache size, and blocks short enough to skip later keys.
PIECE = 1 << 21


def attention_mass(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, valid: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes as in reference.py."""
    if k.dtype == q.dtype and on_tiles(q, k.shape[2], mask, scale):
        return _mass_on_tiles(q, k, mask, scale, valid, groups)
    batch, heads, length = q.shape[:3]
    rows = groups.any(1).any(0).nonzero().squeeze(1)
    keys = k.float().mT.contiguous()
    mass, seen_by = torch.zeros(2, *groups.shape, device=q.device).unbind(0)
    for piece in rows.split(max(1, PIECE // max(1, batch * heads * length))):
        chosen = groups[:, :, piece].float()
        allowed, bias = split_mask(_causal_rows(piece, valid) if mask is None else mask[:, :, piece])
        seen_keys = allowed.any(0).any(0).any(0).nonzero()
        if not len(seen_keys):
            continue
        end = int(seen_keys[-1]) + 1
        allowed = allowed[..., :end]
        scores = _products(q[:, :, piece].float() * scale, keys[..., :end])
        if bias is not None:
            scores += bias[..., :end]
        weights, parts = _weighted_parts(scores.masked_fill_(~allowed, -torch.inf), chosen)
        mass[..., :end] += weights @ parts
        seen_by[..., :end] += chosen @ allowed.float().mean(1)
    return mass, seen_by


def _mass_on_tiles(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, valid: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = q.shape
    if mask is None:
        mask = _causal_rows(torch.arange(length), valid)
    chosen = groups.float()
    seen_by = torch.zeros_like(chosen)
    for piece in torch.arange(length).split(max(1, PIECE // max(1, batch * mask.shape[1] * length))):
        seen_by += chosen[:, :, piece] @ mask[:, :, piece].float().mean(1)
    # The channels of a token, and the keys of a query, must be contiguous; heads and tokens may have any strides.
    q, k, mask = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, mask))
    mask = mask.expand(batch, heads, length, length)
    mass = torch.empty_like(chosen)
    sizes = (batch, heads, k.shape[1], length, size, groups.shape[1])
    native.call("attention_mass_amx", q, k, mask, chosen, mass, *sizes, scale)
    return mass, seen_by


def _weighted_parts(scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """scores: f32[B, H, R, S], chosen: f32[B, M, R] -> f32[B, M, H * R], f32[B, H * R, S]; their product is mass."""
    peak = scores.amax(-1, keepdim=True)
    # A fully masked row has peak -inf: shifted by 0 instead, it stays exp(-inf) = 0.
    parts = scores.sub_(torch.where(peak == -torch.inf, 0.0, peak)).exp_()
    shares = 1 / (scores.shape[1] * parts.sum(-1).clamp(min=torch.finfo(torch.float32).tiny))
    return (chosen[:, :, None] * shares[:, None]).flatten(2), parts.flatten(1, 2)


@RULE.checked
def token_scores(
    hidden: Tensor,
    rounded: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    visual: Tensor,
    valid: Tensor,
    queries: Tensor,
    weights: Sequence[float],
    normalize: str,
    low: float,
    high: float,
    intra_mean: bool,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
    bits: int,
    relative: bool,
    sink: float,
) -> Tensor:
    """Shapes as in reference.py."""
    settings = Settings(weights, normalize, low, high, intra_mean, rotate, group_size, clip_ratio, bits, relative, sink)
    attention, tokens = Attention(q, k, mask, scale), Tokens(visual, valid, queries)
    return reference.token_scores(hidden, rounded, attention, tokens, settings, attention_mass)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """queries: f32[B, H, R, D], keys: f32[B, Hkv, D, S] -> f32[B, H, R, S], one product per KV head."""
    batch, heads, rows, width = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, width)
    return (grouped @ keys).reshape(batch, heads, rows, keys.shape[-1])


def _causal_rows(rows: Tensor, valid: Tensor) -> Tensor:
    """rows: i64[R], valid: bool[B, S] -> bool[B, 1, R, S]."""
    positions = torch.arange(valid.shape[1], device=valid.device)
    return (positions <= rows[:, None]) & valid[:, None, None]
