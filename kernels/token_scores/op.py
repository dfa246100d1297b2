"""`qpcompile::token_scores`: how much each visual token of a prefill matters. Plain torch on every device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.token_scores import cpu
from qpcompile.kernels.token_scores.normalize import METHODS
from qpcompile.kernels.token_scores.reference import QUERIES

WHERE = "qpcompile::token_scores"


@torch.library.custom_op(WHERE, mutates_args=(), device_types=("cpu", "cuda"))
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
) -> Tensor:
    """hidden: f[B, S, C], q: f[B, H, S, D], k: f[B, Hkv, S, D], visual, valid: bool[B, S] -> f32[B, S].

    mask: f or bool [B | 1, 1 | H, S, S], None is causal. weights: of inter, magnitude, intra, residual.
    Visual tokens get the weighted sum, other valid tokens +inf, padding -inf. Terms: see reference.py.
    """
    _check(hidden, q, k, mask, visual, valid)
    _check_options(weights, normalize, low, high, queries)
    settings = (weights, normalize, low, high, queries, intra_mean, rotate)
    return cpu.token_scores(hidden, q, k, mask, scale, visual, valid, *settings)


@token_scores.register_fake
def _(
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
) -> Tensor:
    _check(hidden, q, k, mask, visual, valid)
    _check_options(weights, normalize, low, high, queries)
    return hidden.new_empty(hidden.shape[:2], dtype=torch.float32)


def _check(hidden: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, visual: Tensor, valid: Tensor) -> None:
    ranks = [tensor.dim() for tensor in (hidden, q, k, visual, valid)]
    if ranks != [3, 4, 4, 2, 2] or q.shape[1] % k.shape[1] or (mask is not None and mask.dim() != 4):
        raise KernelError(
            f"hidden, q, k, visual and valid have {ranks} dimensions, q {q.shape[1]} heads and k {k.shape[1]}",
            where=WHERE,
            do="give hidden [B, S, C], q [B, H, S, D], k [B, Hkv, S, D], two [B, S]; mask [B|1, 1|H, S, S] or None",
        )
    if visual.dtype != torch.bool or valid.dtype != torch.bool:
        raise KernelError(
            f"visual is {visual.dtype} and valid is {valid.dtype}", where=WHERE, do="give both as bool[batch, tokens]"
        )


def _check_options(weights: Sequence[float], normalize: str, low: float, high: float, queries: str) -> None:
    if len(weights) != 4 or normalize not in METHODS or queries not in QUERIES or not 0 <= low < high <= 100:
        raise KernelError(
            f"weights {list(weights)}, normalize {normalize!r}, percentiles ({low}, {high}), queries {queries!r}",
            where=WHERE,
            do=f"give four weights, one of {METHODS}, 0 <= low < high <= 100, one of {QUERIES}",
        )


OVERLOAD = torch.ops.qpcompile.token_scores.default
