"""expert_linear as one matrix product per expert, over the slots that chose it: no weight is copied per token."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qpcompile.errors import KernelError


def expert_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Shapes as in reference.py; differentiable."""
    experts, outputs, _ = weight.shape

    def product(expert: int, rows: Tensor) -> Tensor:
        return rows @ weight[expert].to(rows.dtype).T

    return per_expert((x,), index, experts, product, x.new_empty(0, outputs))


def per_expert(
    given: Sequence[Tensor], index: Tensor, experts: int, product: Callable[..., Tensor], empty: Tensor
) -> Tensor:
    """given: [N, I, ...] each, index: i[N, J] -> [N, J, O].

    product: (expert, some rows of each of `given`) -> [n, O], called once per expert that was chosen; empty: [0, O], a
    result of no rows.

    Raises KernelError unless every value of the index names an expert.
    """
    tokens, slots = index.shape
    chosen = checked(index, experts).reshape(-1).long()
    counts = torch.bincount(chosen, minlength=experts).tolist()
    order = chosen.argsort(stable=True)
    source = torch.div(order, slots // given[0].shape[1], rounding_mode="floor")
    flat = [each.reshape(-1, each.shape[2]) for each in given]
    parts, start = [empty], 0
    for expert, count in enumerate(counts):
        if count:
            rows = source[start : start + count]
            parts.append(product(expert, *(each[rows] for each in flat)))
            start += count
    return torch.cat(parts)[order.argsort()].view(tokens, slots, empty.shape[1])


def checked(index: Tensor, experts: int) -> Tensor:
    """`index`; raises KernelError unless every value names an expert."""
    if index.numel():
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= experts:
            raise KernelError(
                f"expert {low if low < 0 else high} of {experts} was chosen",
                where="kernels/expert_linear, operand index",
                do=f"give experts from 0 to {experts - 1}",
            )
    return index
