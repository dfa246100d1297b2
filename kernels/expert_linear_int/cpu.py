"""CPU kernel of expert_linear_int: for few slots one C call, which gathers the rows of each expert; for many the CPU
kernel of linear_int once per expert that was chosen.

A decode step has as many slots as experts of a token: its time is reading their weights, and calls of Python would
add to it. Prompts have many rows per expert, for which linear_int chooses among tiles, oneDNN and C. Sums are exact and
scaled in one order: the results are the same to the last bit.
"""

import torch
from torch import Tensor

from qpcompile.kernels.expert_linear.blocks import checked, per_expert
from qpcompile.kernels.expert_linear_int.rule import RULE
from qpcompile.kernels.linear_int import cpu as linear
from qpcompile.kernels.native import library as native

FEW_SLOTS = 64
"""The most slots of one C call."""


@RULE.checked
def expert_linear_int(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor, dtype: torch.dtype, bits: int
) -> Tensor:
    """Shapes as in reference.py. Raises KernelError unless every value of the index names an expert."""
    if native.takes(scale, weight_scale) and 0 < index.numel() <= FEW_SLOTS:
        return _in_c(q, scale, weight, weight_scale, index, dtype)

    def product(expert: int, rows: Tensor, steps: Tensor) -> Tensor:
        return linear.linear_int(rows, steps, weight[expert], weight_scale[expert], None, dtype, bits)

    experts, outputs, _ = weight.shape
    return per_expert((q, scale), index, experts, product, q.new_empty(0, outputs, dtype=dtype))


def _in_c(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    index: Tensor,
    dtype: torch.dtype,
    level: int | None = None,
) -> Tensor:
    """One C call for any number of slots."""
    (tokens, rows, columns), (experts, features, _) = q.shape, weight.shape
    tensors = q.contiguous(), scale.contiguous(), weight.contiguous(), weight_scale.contiguous()
    chosen = checked(index, experts).long().contiguous()
    made = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    y = torch.empty(*index.shape, features, dtype=made)
    sizes = tokens, rows, index.shape[1], experts, columns, features, scale.shape[-1], weight_scale.shape[-1]
    native.call("expert_linear_int", *tensors, chosen, y, *sizes, level=level)
    return y.to(dtype)
