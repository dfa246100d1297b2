"""`qpcompile::kv_write`: quantize keys or values to codes of 4 bits, packed, or 8."""

import torch
from torch import Tensor

from qpcompile.kernels.kv_write import cpu
from qpcompile.kernels.kv_write.rule import RULE


@torch.library.custom_op("qpcompile::kv_write", mutates_args=(), device_types="cpu")
def kv_write(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2]."""
    return cpu.kv_write(x, bits)


@kv_write.register_kernel("cuda")
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.kv_write import triton

    RULE.check(x, bits)
    return triton.kv_write(x, bits)


@kv_write.register_fake
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return RULE.fake(x, bits)


OVERLOAD = torch.ops.qpcompile.kv_write.default
