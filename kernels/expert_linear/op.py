"""qpcompile::expert_linear: the linear layers of a mixture of experts."""

import torch
from torch import Tensor

from qpcompile.kernels.expert_linear import blocks
from qpcompile.kernels.expert_linear.rule import RULE

WHERE = "qpcompile::expert_linear"


@torch.library.custom_op(WHERE, mutates_args=())
def expert_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """x: f[N, I, C], weight: f[E, O, C], index: i[N, J] with values 0..E-1, J a multiple of I -> f[N, J, O].

    On a GPU the number of slots of each expert is copied to the host.
    """
    RULE.check(x, weight, index)
    return blocks.expert_linear(x, weight, index)


@expert_linear.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    RULE.check(x, weight, index)
    return x.new_empty((index.shape[0], index.shape[1], weight.shape[1]))


OVERLOAD = torch.ops.qpcompile.expert_linear.default
