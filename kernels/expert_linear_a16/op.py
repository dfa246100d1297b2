"""qpcompile::expert_linear_a16: the linear layers of a mixture of experts on floats and quantized weights."""

import torch
from torch import Tensor

from qpcompile.kernels.expert_linear_a16 import blocks
from qpcompile.kernels.expert_linear_a16.rule import RULE


@torch.library.custom_op("qpcompile::expert_linear_a16", mutates_args=())
def expert_linear_a16(x: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor) -> Tensor:
    """x: f[N, I, K], weight: u8[E, O, ceil(K/2)] | i8[E, O, K], weight_scale: f32[E, O, Gw],
    index: i[N, J] with values 0..E-1, J a multiple of I -> x.dtype[N, J, O].

    On a GPU the number of slots of each expert is copied to the host.
    """
    return blocks.expert_linear_a16(x, weight, weight_scale, index)


@expert_linear_a16.register_fake
def _expert_linear_a16_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor) -> Tensor:
    return RULE.fake(x, weight, weight_scale, index)


OVERLOAD = torch.ops.qpcompile.expert_linear_a16.default
