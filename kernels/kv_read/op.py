"""`qpcompile::kv_read`: dequantize codes of 4 bits, packed, or 8, to keys or values."""

import torch
from torch import Tensor

from qpcompile.kernels.kv_read import cpu
from qpcompile.kernels.kv_read.rule import RULE


@torch.library.custom_op("qpcompile::kv_read", mutates_args=(), device_types="cpu")
def kv_read(codes: Tensor, affine: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2] -> dtype[B, H, S, D], D = head_dim."""
    return cpu.kv_read(codes, affine, head_dim, bits, dtype)


@kv_read.register_kernel("cuda")
def _(codes: Tensor, affine: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    from qpcompile.kernels.kv_read import triton

    RULE.check(codes, affine, head_dim, bits, dtype)
    return triton.kv_read(codes, affine, head_dim, bits, dtype)


@kv_read.register_fake
def _(codes: Tensor, affine: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    return RULE.fake(codes, affine, head_dim, bits, dtype)


OVERLOAD = torch.ops.qpcompile.kv_read.default
