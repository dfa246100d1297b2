"""qpcompile::linear_w4a4: linear layer on 4-bit activations and packed 4-bit weights."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_w4a4 import cpu
from qpcompile.kernels.linear_w4a4.rule import RULE


@torch.library.custom_op("qpcompile::linear_w4a4", mutates_args=(), device_types="cpu")
def linear_w4a4(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """q: i8[..., K], scale: f32[..., G], weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw] -> y: dtype[..., N].

    residual: dtype[..., N], added to the rounded y (passes/fuse_kernels.py).
    """
    return cpu.linear_w4a4(q, scale, weight, weight_scale, bias, dtype, residual)


@linear_w4a4.register_kernel("cuda")
def _linear_w4a4_cuda(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    from qpcompile.kernels.linear_w4a4 import triton

    RULE.check(q, scale, weight, weight_scale, bias, dtype, residual)
    return triton.linear_w4a4(q, scale, weight, weight_scale, bias, dtype, residual=residual)


@linear_w4a4.register_fake
def _linear_w4a4_fake(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    return RULE.fake(q, scale, weight, weight_scale, bias, dtype, residual)


OVERLOAD = torch.ops.qpcompile.linear_w4a4.default
