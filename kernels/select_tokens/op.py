"""`qpcompile::select_tokens`: static top-k with a symbolic k."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.select_tokens import reference

WHERE = "qpcompile::select_tokens"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
def select_tokens(scores: Tensor, keep: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    """scores: f32[B, S], keep: N (may be a SymInt), quota: i64[B] -> index: i64[B, N] ascending, valid: bool[B, N].

    valid is False for a token whose rank in its row, from 0, is not below the row's quota.
    """
    _check(scores, quota)
    _check_count(scores, keep)
    return reference.select_tokens(scores, keep, quota)


@select_tokens.register_kernel("cuda")
def _(scores: Tensor, keep: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.select_tokens import triton

    _check(scores, quota)
    _check_count(scores, keep)
    return triton.select_tokens(scores, keep, quota)


@select_tokens.register_fake
def _(scores: Tensor, keep: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    _check(scores, quota)
    shape = (scores.shape[0], keep)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape, dtype=torch.bool)


def _check_count(scores: Tensor, keep: int) -> None:
    # Not in the fake kernel: comparing two symbols there would put a guard on every traced length.
    if not 0 <= keep <= scores.shape[1]:
        raise KernelError(
            f"{keep} tokens to keep of {scores.shape[1]}",
            where=WHERE,
            do="keep at most as many tokens as the row has; the plan's counts must come from the same input",
        )


def _check(scores: Tensor, quota: Tensor) -> None:
    if scores.dim() != 2 or scores.dtype != torch.float32 or quota.dim() != 1 or quota.dtype != torch.int64:
        raise KernelError(
            f"scores {scores.dtype} with {scores.dim()} dimensions and quota {quota.dtype} with {quota.dim()}",
            where=WHERE,
            do="give scores f32[batch, tokens] and quota i64[batch]",
        )


OVERLOAD = torch.ops.qpcompile.select_tokens.default
