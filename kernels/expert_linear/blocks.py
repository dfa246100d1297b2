"""expert_linear as one matrix product per expert, over the slots that chose it: no weight is copied per token."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError


def expert_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Shapes as in reference.py."""
    slots = index.shape[1]
    chosen = index.reshape(-1).long()
    counts = torch.bincount(checked(chosen, weight.shape[0]), minlength=weight.shape[0]).tolist()
    order = chosen.argsort(stable=True)
    flat = x.reshape(-1, x.shape[2])
    source = torch.div(order, slots // x.shape[1], rounding_mode="floor")
    y = x.new_empty(order.shape[0], weight.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            y[order[rows]] = flat[source[rows]] @ weight[expert].to(x.dtype).T
            start += count
    return y.view(index.shape[0], slots, weight.shape[1])


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
