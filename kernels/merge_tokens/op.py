"""`qpcompile::merge_tokens`: merge dropped tokens, or neighbours, into kept tokens."""

import torch
from torch import Tensor

from qpcompile.kernels.merge_tokens import cpu, reference
from qpcompile.kernels.merge_tokens.rule import RULE

WHERE = "qpcompile::merge_tokens"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
def merge_tokens(
    hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int
) -> Tensor:
    """hidden: f[B, S, C], keys: f[B, S, K], weights: f32[B, S], targets, sources: bool[B, S] -> as hidden.

    nearest: 0 adds to a target the mean of the sources it is closest to; n the weighted sum of its n closest sources.
    """
    return cpu.merge_tokens(hidden, keys, weights, targets, sources, nearest)


@merge_tokens.register_kernel("cuda")
def _(hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int) -> Tensor:
    RULE.check(hidden, keys, weights, targets, sources, nearest)
    return reference.merge_tokens(hidden, keys, weights, targets, sources, nearest)


@merge_tokens.register_fake
def _(hidden: Tensor, keys: Tensor, weights: Tensor, targets: Tensor, sources: Tensor, nearest: int) -> Tensor:
    return RULE.fake(hidden, keys, weights, targets, sources, nearest)


OVERLOAD = torch.ops.qpcompile.merge_tokens.default
