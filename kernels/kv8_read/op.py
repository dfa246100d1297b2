"""`qpcompile::kv8_read`: dequantize 8-bit codes to keys or values."""

import torch
from torch import Tensor

from qpcompile.kernels.kv8_read import reference
from qpcompile.kernels.kv8_read.rule import RULE


@torch.library.custom_op("qpcompile::kv8_read", mutates_args=(), device_types="cpu")
def kv8_read(codes: Tensor, affine: Tensor, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, D], affine: f32[B, H, S, 2] -> dtype[B, H, S, D]."""
    RULE.check(codes, affine, dtype)
    return reference.kv8_read(codes, affine, dtype).contiguous()


@kv8_read.register_kernel("cuda")
def _(codes: Tensor, affine: Tensor, dtype: torch.dtype) -> Tensor:
    from qpcompile.kernels.kv8_read import triton

    RULE.check(codes, affine, dtype)
    return triton.kv8_read(codes, affine, dtype)


@kv8_read.register_fake
def _(codes: Tensor, affine: Tensor, dtype: torch.dtype) -> Tensor:
    return RULE.fake(codes, affine, dtype)


OVERLOAD = torch.ops.qpcompile.kv8_read.default
