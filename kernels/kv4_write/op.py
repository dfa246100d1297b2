"""`qpcompile::kv4_write`: keys or values to packed 4-bit codes."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.kv4_write import cpu


@torch.library.custom_op("qpcompile::kv4_write", mutates_args=(), device_types="cpu")
def kv4_write(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, ceil(D / 2)], affine: f32[B, H, S, 2]."""
    _check(x)
    return cpu.kv4_write(x)


@kv4_write.register_kernel("cuda")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.kv4_write import triton

    _check(x)
    return triton.kv4_write(x)


@kv4_write.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    batch, heads, length, head_dim = x.shape
    codes = x.new_empty((batch, heads, length, (head_dim + 1) // 2), dtype=torch.uint8)
    return codes, x.new_empty((batch, heads, length, 2), dtype=torch.float32)


def _check(x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise KernelError(
            f"kv4_write got {x.dtype} with {x.dim()} dimensions",
            where="qpcompile::kv4_write",
            do="give floating-point keys or values of shape [batch, heads, tokens, head size]",
        )


OVERLOAD = torch.ops.qpcompile.kv4_write.default
