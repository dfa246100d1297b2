"""`qpcompile::kv8_write`: keys or values to 8-bit codes."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.kv8_write import reference


@torch.library.custom_op("qpcompile::kv8_write", mutates_args=(), device_types="cpu")
def kv8_write(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, D], affine: f32[B, H, S, 2]."""
    _check(x)
    return reference.kv8_write(x)


@kv8_write.register_kernel("cuda")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.kv8_write import triton

    _check(x)
    return triton.kv8_write(x)


@kv8_write.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    affine = x.new_empty((*x.shape[:3], 2), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), affine


def _check(x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise KernelError(
            f"kv8_write got {x.dtype} with {x.dim()} dimensions",
            where="qpcompile::kv8_write",
            do="give floating-point keys or values of shape [batch, heads, tokens, head size]",
        )


OVERLOAD = torch.ops.qpcompile.kv8_write.default
