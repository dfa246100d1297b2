"""`qpcompile::dpp_select`: rank tokens by greedy MAP inference of a determinantal point process (DPP)."""

import torch
from torch import Tensor

from qpcompile.kernels.dpp_select import reference
from qpcompile.kernels.dpp_select.rule import RULE

WHERE = "qpcompile::dpp_select"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
def dpp_select(features: Tensor, relevance: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    """features: f[B, S, C], relevance: f32[B, S], counted: bool[B, S], budget: i64[B] -> f32[B, S], first is highest.

    O(S C T + S T^2) time and O(S T) memory for T = max budget on a CPU; O(S^2) memory on a GPU.
    """
    RULE.check(features, relevance, counted, budget)
    return reference.dpp_select(features, relevance, counted, budget)


@dpp_select.register_kernel("cuda")
def _(features: Tensor, relevance: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    from qpcompile.kernels.dpp_select import triton

    RULE.check(features, relevance, counted, budget)
    return triton.dpp_select(features, relevance, counted, budget)


@dpp_select.register_fake
def _(features: Tensor, relevance: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    return RULE.fake(features, relevance, counted, budget)


OVERLOAD = torch.ops.qpcompile.dpp_select.default
