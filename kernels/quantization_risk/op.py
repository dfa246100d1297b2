"""`qpcompile::quantization_risk`: score tokens by their 4-bit quantization error. Plain torch on every device."""

import torch
from torch import Tensor

from qpcompile.kernels.quantization_risk import reference
from qpcompile.kernels.quantization_risk.rule import RULE

WHERE = "qpcompile::quantization_risk"


@torch.library.custom_op(WHERE, mutates_args=())
def quantization_risk(features: Tensor, counted: Tensor, metric: str, group_size: int) -> Tensor:
    """features: f[B, S, C], counted: bool[B, S], metric: one of METRICS -> f32[B, S] in 0..1."""
    RULE.check(features, counted, metric, group_size)
    return reference.quantization_risk(features, counted, metric, group_size).contiguous()


@quantization_risk.register_fake
def _(features: Tensor, counted: Tensor, metric: str, group_size: int) -> Tensor:
    return RULE.fake(features, counted, metric, group_size)


OVERLOAD = torch.ops.qpcompile.quantization_risk.default
