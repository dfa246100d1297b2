"""qpcompile::linear_int: linear layer on codes of activations and weights."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_int import cpu
from qpcompile.kernels.linear_int.rule import RULE


@torch.library.custom_op("qpcompile::linear_int", mutates_args=(), device_types="cpu")
def linear_int(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    residual: Tensor | None = None,
) -> Tensor:
    """q: i8[..., K], scale: f32[..., G], weight: u8[N, ceil(K/2)] | i8[N, K], weight_scale: f32[N, Gw] -> f[..., N].

    bits: of the codes q: 4 promises -8 to 7, which the GPU kernel is faster with; 8 allows any.
    residual: dtype[..., N], added to the rounded y (passes/fuse_kernels.py).
    """
    return cpu.linear_int(q, scale, weight, weight_scale, bias, dtype, bits, residual)


@linear_int.register_kernel("cuda")
def _linear_int_cuda(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    residual: Tensor | None = None,
) -> Tensor:
    from qpcompile.kernels.linear_int import triton

    RULE.check(q, scale, weight, weight_scale, bias, dtype, bits, residual)
    return triton.linear_int(q, scale, weight, weight_scale, bias, dtype, bits, residual)


@linear_int.register_fake
def _linear_int_fake(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    residual: Tensor | None = None,
) -> Tensor:
    return RULE.fake(q, scale, weight, weight_scale, bias, dtype, bits, residual)


OVERLOAD = torch.ops.qpcompile.linear_int.default
