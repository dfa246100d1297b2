"""`qpcompile::fuse_risk`: combine a score and a quantization risk. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.kernels.fuse_risk import reference
from qpcompile.kernels.fuse_risk.rule import RULE

WHERE = "qpcompile::fuse_risk"


@torch.library.custom_op(WHERE, mutates_args=())
def fuse_risk(scores: Tensor, risk: Tensor, counted: Tensor, alpha: float, dynamic: bool, minmax: bool) -> Tensor:
    """scores, risk: f32[B, S], counted: bool[B, S], alpha: 0..1 -> f32[B, S]."""
    RULE.check(scores, risk, counted, alpha, dynamic, minmax)
    return reference.fuse_risk(scores, risk, counted, alpha, dynamic, minmax).contiguous()


@fuse_risk.register_fake
def _(scores: Tensor, risk: Tensor, counted: Tensor, alpha: float, dynamic: bool, minmax: bool) -> Tensor:
    return RULE.fake(scores, risk, counted, alpha, dynamic, minmax)


OVERLOAD = torch.ops.qpcompile.fuse_risk.default
