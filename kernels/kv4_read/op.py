"""`qpcompile::kv4_read`: dequantize packed 4-bit codes to keys or values."""

import torch
from torch import Tensor

from qpcompile.kernels.kv4_read import cpu
from qpcompile.kernels.kv4_read.rule import RULE


@torch.library.custom_op("qpcompile::kv4_read", mutates_args=(), device_types="cpu")
def kv4_read(codes: Tensor, affine: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, ceil(D / 2)], affine: f32[B, H, S, 2] -> dtype[B, H, S, D], D = head_dim."""
    return cpu.kv4_read(codes, affine, head_dim, dtype)


@kv4_read.register_kernel("cuda")
def _(codes: Tensor, affine: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    from qpcompile.kernels.kv4_read import triton

    RULE.check(codes, affine, head_dim, dtype)
    return triton.kv4_read(codes, affine, head_dim, dtype)


@kv4_read.register_fake
def _(codes: Tensor, affine: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    return RULE.fake(codes, affine, head_dim, dtype)


OVERLOAD = torch.ops.qpcompile.kv4_read.default
