"""qpcompile::expert_linear_int: the linear layers of a mixture of experts on codes of activations and weights."""

import torch
from torch import Tensor

from qpcompile.kernels.expert_linear_int import cpu
from qpcompile.kernels.expert_linear_int.rule import RULE


@torch.library.custom_op("qpcompile::expert_linear_int", mutates_args=(), device_types="cpu")
def expert_linear_int(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor, dtype: torch.dtype, bits: int
) -> Tensor:
    """q: i8[N, I, K], scale: f32[N, I, G], weight: u8[E, O, ceil(K/2)] | i8[E, O, K], weight_scale: f32[E, O, Gw],
    index: i[N, J] with values 0..E-1, J a multiple of I -> f[N, J, O].

    bits: of the codes q, as for linear_int.
    """
    return cpu.expert_linear_int(q, scale, weight, weight_scale, index, dtype, bits)


@expert_linear_int.register_kernel("cuda")
def _expert_linear_int_cuda(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor, dtype: torch.dtype, bits: int
) -> Tensor:
    from qpcompile.kernels.expert_linear_int import triton

    RULE.check(q, scale, weight, weight_scale, index, dtype, bits)
    return triton.expert_linear_int(q, scale, weight, weight_scale, index, dtype, bits)


@expert_linear_int.register_fake
def _expert_linear_int_fake(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor, dtype: torch.dtype, bits: int
) -> Tensor:
    return RULE.fake(q, scale, weight, weight_scale, index, dtype, bits)


OVERLOAD = torch.ops.qpcompile.expert_linear_int.default
