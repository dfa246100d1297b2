"""qpcompile::channel_delta: the recurrence of layers that forget each channel of their state at its own rate."""

import torch
from torch import Tensor

from qpcompile.kernels.channel_delta import blocks
from qpcompile.kernels.channel_delta.rule import RULE

WHERE = "qpcompile::channel_delta"


@torch.library.custom_op(WHERE, mutates_args=())
def channel_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in reference.py."""
    RULE.check(q, k, v, decay, beta, state)
    y, after = blocks.channel_delta(q, k, v, decay, beta, state)
    return y.contiguous(), after.contiguous()


@channel_delta.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    RULE.check(q, k, v, decay, beta, state)
    return q.new_empty((*q.shape[:3], v.shape[3])), torch.empty_like(state, memory_format=torch.contiguous_format)


OVERLOAD = torch.ops.qpcompile.channel_delta.default
