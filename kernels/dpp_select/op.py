"""`qpcompile::dpp_select`: tokens in the order in which greedy MAP of a determinantal process picks them."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.dpp_select import reference

WHERE = "qpcompile::dpp_select"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
def dpp_select(features: Tensor, relevance: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    """features: f[B, S, C], relevance: f32[B, S], counted: bool[B, S], budget: i64[B] -> f32[B, S], first is highest.

    O(S C T + S T^2) time and O(S T) memory for T = max budget on a CPU; O(S^2) memory on a GPU.
    """
    check_choice(WHERE, features, counted, budget)
    _check_relevance(relevance, counted)
    return reference.dpp_select(features, relevance, counted, budget)


@dpp_select.register_kernel("cuda")
def _(features: Tensor, relevance: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    from qpcompile.kernels.dpp_select import triton

    check_choice(WHERE, features, counted, budget)
    _check_relevance(relevance, counted)
    return triton.dpp_select(features, relevance, counted, budget)


@dpp_select.register_fake
def _(features: Tensor, relevance: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    check_choice(WHERE, features, counted, budget)
    _check_relevance(relevance, counted)
    return features.new_empty(counted.shape, dtype=torch.float32)


def check_choice(where: str, features: Tensor, counted: Tensor, budget: Tensor) -> None:
    """Raise KernelError unless these are f[B, S, C], bool[B, S] and i64[B]."""
    ranks = (features.dim(), counted.dim(), budget.dim())
    if ranks != (3, 2, 1) or not features.is_floating_point() or (counted.dtype, budget.dtype) != _TYPES:
        raise KernelError(
            f"features {features.dtype}, counted {counted.dtype} and budget {budget.dtype} have {ranks} dimensions",
            where=where,
            do="give features f[batch, tokens, width], counted bool[batch, tokens] and budget i64[batch]",
        )


def _check_relevance(relevance: Tensor, counted: Tensor) -> None:
    if relevance.dtype != torch.float32 or relevance.dim() != counted.dim():
        raise KernelError(
            f"relevance is {relevance.dtype} with {relevance.dim()} dimensions",
            where=WHERE,
            do="give relevance f32[batch, tokens]",
        )


_TYPES = (torch.bool, torch.int64)
OVERLOAD = torch.ops.qpcompile.dpp_select.default
