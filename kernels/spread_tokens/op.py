"""`qpcompile::spread_tokens`: who stays because it scores high, and who because it lies where few others stay."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.spread_tokens import reference

WHERE = "qpcompile::spread_tokens"


@torch.library.custom_op(WHERE, mutates_args=())
def spread_tokens(scores: Tensor, counted: Tensor, budget: Tensor, share: float) -> Tensor:
    """scores: f32[B, S], counted: bool[B, S], budget: i64[B] counted tokens to keep, share: 0..1 -> f32[B, S].

    2 for the best, 1 for the spread ones, 0 for the rest. Plain torch on every device.
    """
    _check(scores, counted, budget, share)
    return reference.spread_tokens(scores, counted, budget, share)


@spread_tokens.register_fake
def _(scores: Tensor, counted: Tensor, budget: Tensor, share: float) -> Tensor:
    _check(scores, counted, budget, share)
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _check(scores: Tensor, counted: Tensor, budget: Tensor, share: float) -> None:
    kinds = (scores.dtype, counted.dtype, budget.dtype)
    if kinds != (torch.float32, torch.bool, torch.int64) or (scores.dim(), counted.dim(), budget.dim()) != (2, 2, 1):
        raise KernelError(
            f"scores {scores.dtype} with {scores.dim()} dimensions, counted {counted.dtype} with {counted.dim()}, "
            f"budget {budget.dtype} with {budget.dim()}",
            where=WHERE,
            do="give scores f32[batch, tokens], counted bool[batch, tokens] and budget i64[batch]",
        )
    if not 0 <= share <= 1:
        raise KernelError(f"a share of {share}", where=WHERE, do="give a number from 0 to 1")


OVERLOAD = torch.ops.qpcompile.spread_tokens.default
