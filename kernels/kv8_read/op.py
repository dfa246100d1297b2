"""`qpcompile::kv8_read`: 8-bit codes back to keys or values."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.kv8_read import reference


@torch.library.custom_op("qpcompile::kv8_read", mutates_args=(), device_types="cpu")
def kv8_read(codes: Tensor, affine: Tensor, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, D], affine: f32[B, H, S, 2] -> dtype[B, H, S, D]."""
    _check(codes, affine)
    return reference.kv8_read(codes, affine, dtype)


@kv8_read.register_kernel("cuda")
def _(codes: Tensor, affine: Tensor, dtype: torch.dtype) -> Tensor:
    from qpcompile.kernels.kv8_read import triton

    _check(codes, affine)
    return triton.kv8_read(codes, affine, dtype)


@kv8_read.register_fake
def _(codes: Tensor, affine: Tensor, dtype: torch.dtype) -> Tensor:
    _check(codes, affine)
    return codes.new_empty(codes.shape, dtype=dtype)


def _check(codes: Tensor, affine: Tensor) -> None:
    if codes.dim() != 4 or codes.dtype != torch.uint8 or affine.dim() != 4 or affine.shape[-1] != 2:
        raise KernelError(
            f"an 8-bit cache is u8[B, H, S, D] with f32[B, H, S, 2], got {codes.dtype} {list(codes.shape)} "
            f"with {affine.dtype} {list(affine.shape)}",
            where="qpcompile::kv8_read",
            do="pass both outputs of qpcompile::kv8_write",
        )


OVERLOAD = torch.ops.qpcompile.kv8_read.default
