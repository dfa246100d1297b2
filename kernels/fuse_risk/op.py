"""`qpcompile::fuse_risk`: a score and a quantization risk become one score. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.fuse_risk import reference

WHERE = "qpcompile::fuse_risk"


@torch.library.custom_op(WHERE, mutates_args=())
def fuse_risk(scores: Tensor, risk: Tensor, counted: Tensor, alpha: float, dynamic: bool, minmax: bool) -> Tensor:
    """scores, risk: f32[B, S], counted: bool[B, S], alpha: 0..1 -> f32[B, S]."""
    _check(scores, risk, counted, alpha)
    return reference.fuse_risk(scores, risk, counted, alpha, dynamic, minmax)


@fuse_risk.register_fake
def _(scores: Tensor, risk: Tensor, counted: Tensor, alpha: float, dynamic: bool, minmax: bool) -> Tensor:
    _check(scores, risk, counted, alpha)
    return scores.new_empty(scores.shape)


def _check(scores: Tensor, risk: Tensor, counted: Tensor, alpha: float) -> None:
    types = (scores.dtype, risk.dtype, counted.dtype)
    ranks = (scores.dim(), risk.dim(), counted.dim())
    if ranks != (2, 2, 2) or types != (torch.float32, torch.float32, torch.bool) or not 0 <= alpha <= 1:
        raise KernelError(
            f"scores, risk and counted are {types} with {ranks} dimensions, alpha is {alpha}",
            where=WHERE,
            do="give scores and risk f32[batch, tokens], counted bool[batch, tokens], alpha from 0 to 1",
        )


OVERLOAD = torch.ops.qpcompile.fuse_risk.default
