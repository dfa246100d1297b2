"""`qpcompile::rmsnorm`: root-mean-square norm, one node for six in transformers' traces."""

import torch

from qpcompile.kernels.rmsnorm.reference import rmsnorm as reference
from qpcompile.kernels.rmsnorm.rule import RULE


@torch.library.custom_op("qpcompile::rmsnorm", mutates_args=())
def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: f[..., C]; weight: f[C]; returns f[..., C]."""
    RULE.check(x, weight, eps)
    return reference(x, weight, eps)


@rmsnorm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    RULE.check(x, weight, eps)
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))


OVERLOAD = torch.ops.qpcompile.rmsnorm.default
