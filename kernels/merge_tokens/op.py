"""`qpcompile::merge_tokens`: what is left of dropped tokens is added to tokens that stay."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.merge_tokens import cpu, reference

WHERE = "qpcompile::merge_tokens"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
def merge_tokens(
    hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int
) -> Tensor:
    """hidden: f[B, S, C], keys: f[B, S, K], weights: f32[B, S], targets, sources: bool[B, S] -> as hidden.

    nearest: 0 adds to a target the mean of the sources it is closest to; n the weighted sum of its n closest sources.
    """
    _check(hidden, keys, weights, targets, sources, nearest)
    return cpu.merge_tokens(hidden, keys, weights, targets, sources, nearest)


@merge_tokens.register_kernel("cuda")
def _(hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int) -> Tensor:
    _check(hidden, keys, weights, targets, sources, nearest)
    return reference.merge_tokens(hidden, keys, weights, targets, sources, nearest)


@merge_tokens.register_fake
def _(hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int) -> Tensor:
    _check(hidden, keys, weights, targets, sources, nearest)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _check(hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int) -> None:
    ranks = [each.dim() for each in (hidden, keys, weights, targets, sources)]
    if ranks != [3, 3, 2, 2, 2] or nearest < 0:
        raise KernelError(
            f"hidden, keys, weights, targets and sources have {ranks} dimensions, nearest is {nearest}",
            where=WHERE,
            do="give hidden [B, S, C], keys [B, S, K], three [B, S], and nearest from 0",
        )
    if weights.dtype != torch.float32 or targets.dtype != torch.bool or sources.dtype != torch.bool:
        raise KernelError(
            f"weights are {weights.dtype}, targets {targets.dtype}, sources {sources.dtype}",
            where=WHERE,
            do="give weights f32, targets and sources bool",
        )


OVERLOAD = torch.ops.qpcompile.merge_tokens.default
