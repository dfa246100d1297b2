"""`qpcompile::pivot_tokens`: a few pivots and the tokens least like them. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.dpp_select.op import check_choice
from qpcompile.kernels.pivot_tokens import reference

WHERE = "qpcompile::pivot_tokens"


@torch.library.custom_op(WHERE, mutates_args=())
def pivot_tokens(
    hidden: Tensor, keys: Tensor, visual: Tensor, valid: Tensor, budget: Tensor, visual_pivots: int, text_pivots: int
) -> Tensor:
    """hidden: f[B, S, C], keys: f[B, H, S, D], visual, valid: bool[B, S], budget: i64[B] -> f32[B, S]."""
    _check(hidden, keys, visual, valid, budget, (visual_pivots, text_pivots))
    return reference.pivot_tokens(hidden, keys, visual, valid, budget, visual_pivots, text_pivots)


@pivot_tokens.register_fake
def _(
    hidden: Tensor, keys: Tensor, visual: Tensor, valid: Tensor, budget: Tensor, visual_pivots: int, text_pivots: int
) -> Tensor:
    _check(hidden, keys, visual, valid, budget, (visual_pivots, text_pivots))
    return hidden.new_empty(visual.shape, dtype=torch.float32)


def _check(
    hidden: Tensor, keys: Tensor, visual: Tensor, valid: Tensor, budget: Tensor, pivots: tuple[int, int]
) -> None:
    check_choice(WHERE, hidden, visual, budget)
    if keys.dim() != 4 or valid.dim() != 2 or valid.dtype != torch.bool or min(pivots) < 0 or sum(pivots) < 1:
        raise KernelError(
            f"keys have {keys.dim()} dimensions, valid is {valid.dtype} with {valid.dim()}, pivots are {pivots}",
            where=WHERE,
            do="give keys f[batch, heads, tokens, width], valid bool[batch, tokens], and a pivot at least",
        )


OVERLOAD = torch.ops.qpcompile.pivot_tokens.default
