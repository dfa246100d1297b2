"""`qpcompile::select_tokens`: static top-k with a symbolic k."""

import torch
from torch import Tensor

from qpcompile.kernels.select_tokens import reference
from qpcompile.kernels.select_tokens.rule import RULE

WHERE = "qpcompile::select_tokens"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
def select_tokens(scores: Tensor, keep: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    """scores: f32[B, S], keep: N (may be a SymInt), quota: i64[B] -> index: i64[B, N] ascending, valid: bool[B, N].

    valid is False for a token whose rank in its row, from 0, is not below the row's quota.
    """
    RULE.check(scores, keep, quota)
    return reference.select_tokens(scores, keep, quota)


@select_tokens.register_kernel("cuda")
def _(scores: Tensor, keep: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.select_tokens import triton

    RULE.check(scores, keep, quota)
    return triton.select_tokens(scores, keep, quota)


@select_tokens.register_fake
def _(scores: Tensor, keep: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    return RULE.fake(scores, keep, quota)


OVERLOAD = torch.ops.qpcompile.select_tokens.default
