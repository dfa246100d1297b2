"""qpcompile::gated_delta: the recurrence of layers that keep a state instead of keys and values."""

import torch
from torch import Tensor

from qpcompile.kernels.gated_delta import blocks
from qpcompile.kernels.gated_delta.rule import RULE

WHERE = "qpcompile::gated_delta"


@torch.library.custom_op(WHERE, mutates_args=())
def gated_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in reference.py."""
    RULE.check(q, k, v, decay, beta, state)
    y, after = blocks.gated_delta(q, k, v, decay, beta, state)
    return y.contiguous(), after.contiguous()


@gated_delta.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    RULE.check(q, k, v, decay, beta, state)
    return q.new_empty((*q.shape[:3], v.shape[3])), torch.empty_like(state, memory_format=torch.contiguous_format)


OVERLOAD = torch.ops.qpcompile.gated_delta.default
