"""qpcompile::linear_w4a16: linear layer on floating-point activations and packed 4-bit weights."""

import torch
from torch import Tensor

from qpcompile.kernels.linear_w4a16 import cpu, reference
from qpcompile.kernels.linear_w4a16.rule import RULE


@torch.library.custom_op("qpcompile::linear_w4a16", mutates_args=(), device_types="cpu")
def linear_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: f[..., K], weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw], bias: f[N] -> x.dtype[..., N]."""
    return cpu.linear_w4a16(x, weight, weight_scale, bias)


@linear_w4a16.register_kernel("cuda")
def _linear_w4a16_cuda(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    from qpcompile.kernels.linear_w4a16 import triton

    RULE.check(x, weight, weight_scale, bias)
    if triton.takes(x, weight_scale):
        return triton.linear_w4a16(x, weight, weight_scale, bias)
    # The product runs in the type of x on tensor cores, which accumulate in float32.
    dense = reference.dequantize_weight(weight, x.shape[-1], weight_scale).to(x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


@linear_w4a16.register_fake
def _linear_w4a16_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return RULE.fake(x, weight, weight_scale, bias)


OVERLOAD = torch.ops.qpcompile.linear_w4a16.default
