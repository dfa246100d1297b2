"""`qpcompile::farthest_tokens`: rank tokens by greedy max-min diversity (farthest-point sampling)."""

import torch
from torch import Tensor

from qpcompile.kernels.farthest_tokens import reference
from qpcompile.kernels.farthest_tokens.rule import RULE

WHERE = "qpcompile::farthest_tokens"


@torch.library.custom_op(WHERE, mutates_args=())
def farthest_tokens(features: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    """features: f[B, S, C], counted: bool[B, S], budget: i64[B] -> f32[B, S], the first pick is highest, unpicked
    tokens are 0.

    Plain torch on every device.
    """
    RULE.check(features, counted, budget)
    return reference.farthest_tokens(features, counted, budget)


@farthest_tokens.register_fake
def _(features: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    return RULE.fake(features, counted, budget)


OVERLOAD = torch.ops.qpcompile.farthest_tokens.default
