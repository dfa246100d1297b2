"""`qpcompile::kv4_write`: quantize keys or values to packed 4-bit codes."""

import torch
from torch import Tensor

from qpcompile.kernels.kv4_write import cpu
from qpcompile.kernels.kv4_write.rule import RULE


@torch.library.custom_op("qpcompile::kv4_write", mutates_args=(), device_types="cpu")
def kv4_write(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, ceil(D / 2)], affine: f32[B, H, S, 2]."""
    return cpu.kv4_write(x)


@kv4_write.register_kernel("cuda")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.kv4_write import triton

    RULE.check(x)
    return triton.kv4_write(x)


@kv4_write.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return RULE.fake(x)


OVERLOAD = torch.ops.qpcompile.kv4_write.default
