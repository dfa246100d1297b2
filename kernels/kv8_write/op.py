"""`qpcompile::kv8_write`: quantize keys or values to 8-bit codes."""

import torch
from torch import Tensor

from qpcompile.kernels.kv8_write import reference
from qpcompile.kernels.kv8_write.rule import RULE


@torch.library.custom_op("qpcompile::kv8_write", mutates_args=(), device_types="cpu")
def kv8_write(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, D], affine: f32[B, H, S, 2]."""
    RULE.check(x)
    return reference.kv8_write(x)


@kv8_write.register_kernel("cuda")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.kv8_write import triton

    RULE.check(x)
    return triton.kv8_write(x)


@kv8_write.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return RULE.fake(x)


OVERLOAD = torch.ops.qpcompile.kv8_write.default
