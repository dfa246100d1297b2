"""`qpcompile::token_scores`: how much each visual token of a prefill matters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.token_scores import cpu, reference
from qpcompile.kernels.token_scores.normalize import METHODS

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
    relative: bool,
    sink: float,
) -> Tensor:
    """hidden: f[B, S, C], rounded: f[B, S, D], q: f[B, H, S, E], k: f[B, Hkv, S, E] -> f32[B, S].

    visual, valid, queries: bool[B, S], the last one the text rows whose attention counts.
    mask: f or bool [B | 1, 1 | H, S, S], None is causal. weights: of inter, magnitude, intra, residual.
    Visual tokens get the weighted sum, other valid tokens +inf, padding -inf. Terms and options: see reference.py.
    """
    _check(hidden, rounded, q, k, mask, (visual, valid, queries))
    _check_options(weights, normalize, low, high, sink)
    settings = (weights, normalize, low, high, intra_mean, rotate, group_size, clip_ratio, relative, sink)
    return cpu.token_scores(hidden, rounded, q, k, mask, scale, visual, valid, queries, *settings)


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
    relative: bool,
    sink: float,
) -> Tensor:
    from qpcompile.kernels.token_scores import triton

    _check(hidden, rounded, q, k, mask, (visual, valid, queries))
    _check_options(weights, normalize, low, high, sink)
    settings = (weights, normalize, low, high, intra_mean, rotate, group_size, clip_ratio, relative, sink)
    tensors = (hidden, rounded, q, k, mask, scale, visual, valid, queries)
    return reference.token_scores(*tensors, *settings, mass_of=triton.attention_mass)


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
    relative: bool,
    sink: float,
) -> Tensor:
    _check(hidden, rounded, q, k, mask, (visual, valid, queries))
    _check_options(weights, normalize, low, high, sink)
    return hidden.new_empty(hidden.shape[:2], dtype=torch.float32)


def _check(
    hidden: Tensor, rounded: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, flags: tuple[Tensor, Tensor, Tensor]
) -> None:
    ranks = [tensor.dim() for tensor in (hidden, rounded, q, k, *flags)]
    if ranks != [3, 3, 4, 4, 2, 2, 2] or q.shape[1] % k.shape[1] or (mask is not None and mask.dim() != 4):
        raise KernelError(
            f"hidden, rounded, q, k, visual, valid and queries have {ranks} dimensions, q {q.shape[1]} heads and "
            f"k {k.shape[1]}",
            where=WHERE,
            do="give two [B, S, C], q [B, H, S, D], k [B, Hkv, S, D], three [B, S]; mask [B|1, 1|H, S, S] or None",
        )
    if any(flag.dtype != torch.bool for flag in flags):
        raise KernelError(
            f"visual is {flags[0].dtype}, valid {flags[1].dtype} and queries {flags[2].dtype}",
            where=WHERE,
            do="give all three as bool[batch, tokens]",
        )


def _check_options(weights: Sequence[float], normalize: str, low: float, high: float, sink: float) -> None:
    if len(weights) != 4 or normalize not in METHODS or not 0 <= low < high <= 100 or sink < 0:
        raise KernelError(
            f"weights {list(weights)}, normalize {normalize!r}, percentiles ({low}, {high}), sink {sink}",
            where=WHERE,
            do=f"give four weights, one of {METHODS}, 0 <= low < high <= 100, sink of at least 0",
        )


OVERLOAD = torch.ops.qpcompile.token_scores.default
