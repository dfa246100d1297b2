"""qpcompile::linear_w8a16: linear layer on floating-point activations and 8-bit weights."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_w8a16 import cpu, reference
from qpcompile.kernels.linear_w8a16.rule import RULE


@torch.library.custom_op("qpcompile::linear_w8a16", mutates_args=(), device_types="cpu")
def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: f[..., K], weight: i8[N, K], weight_scale: f32[N, 1], bias: f[N] -> x.dtype[..., N]."""
    return cpu.linear_w8a16(x, weight, weight_scale, bias)


@linear_w8a16.register_kernel("cuda")
def _linear_w8a16_cuda(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    from qpcompile.kernels.linear_w8a16 import triton

    RULE.check(x, weight, weight_scale, bias)
    takes = triton.linear_w8a16 if triton.takes(x) else reference.linear_w8a16
    return takes(x, weight, weight_scale, bias)


@linear_w8a16.register_fake
def _linear_w8a16_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return RULE.fake(x, weight, weight_scale, bias)


OVERLOAD = torch.ops.qpcompile.linear_w8a16.default
