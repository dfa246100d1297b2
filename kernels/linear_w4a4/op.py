"""qpcompile::linear_w4a4, the linear layer on 4-bit activations and packed 4-bit weights."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_w4a4 import cpu
from qpcompile.kernels.linear_w4a4.reference import check_linear, check_residual


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

    residual: dtype[..., N], added to the rounded y; only graphs that are bound to a device have one (bind_residual.py).
    """
    check_linear(q.shape[-1], scale.shape[-1], weight, weight_scale, bias)
    check_residual(residual, [*q.shape[:-1], weight.shape[0]], dtype)
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

    check_linear(q.shape[-1], scale.shape[-1], weight, weight_scale, bias)
    check_residual(residual, [*q.shape[:-1], weight.shape[0]], dtype)
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
    check_linear(q.shape[-1], scale.shape[-1], weight, weight_scale, bias)
    check_residual(residual, [*q.shape[:-1], weight.shape[0]], dtype)
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


OVERLOAD = torch.ops.qpcompile.linear_w4a4.default
