"""`qpcompile::token_scores`: importance scores of visual tokens in a prefill."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qpcompile.kernels.token_scores import cpu, reference
from qpcompile.kernels.token_scores.rule import RULE
from qpcompile.kernels.token_scores.settings import Attention, Settings, Tokens

WHERE = "qpcompile::token_scores"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
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
    """hidden: f[B, S, C], rounded: f[B, S, D], q: f[B, H, S, E], k: f[B, Hkv, S, E] -> f32[B, S].

    visual, valid, queries: bool[B, S], the last one the text rows whose attention counts.
    mask: f or bool [B | 1, 1 | H, S, S], None is causal. weights: of inter, magnitude, intra, residual.
    Visual tokens get the weighted sum, other valid tokens +inf, padding -inf. Terms and options: see reference.py.
    """
    settings = (weights, normalize, low, high, intra_mean, rotate, group_size, clip_ratio, bits, relative, sink)
    return cpu.token_scores(hidden, rounded, q, k, mask, scale, visual, valid, queries, *settings).contiguous()


@token_scores.register_kernel("cuda")
def _(
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
    from qpcompile.kernels.token_scores import triton

    settings = (weights, normalize, low, high, intra_mean, rotate, group_size, clip_ratio, bits, relative, sink)
    RULE.check(hidden, rounded, q, k, mask, scale, visual, valid, queries, *settings)
    attention, tokens = Attention(q, k, mask, scale), Tokens(visual, valid, queries)
    scores = reference.token_scores(hidden, rounded, attention, tokens, Settings(*settings), triton.attention_mass)
    return scores.contiguous()


@token_scores.register_fake
def _(
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
    settings = (weights, normalize, low, high, intra_mean, rotate, group_size, clip_ratio, bits, relative, sink)
    return RULE.fake(hidden, rounded, q, k, mask, scale, visual, valid, queries, *settings)


OVERLOAD = torch.ops.qpcompile.token_scores.default
