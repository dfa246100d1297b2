"""`qpcompile::kv4_read`: packed 4-bit codes back to keys or values."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.kv4_read import cpu


@torch.library.custom_op("qpcompile::kv4_read", mutates_args=(), device_types="cpu")
def kv4_read(codes: Tensor, affine: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, ceil(D / 2)], affine: f32[B, H, S, 2] -> dtype[B, H, S, D], D = head_dim."""
    check_cache(codes, affine, head_dim, "qpcompile::kv4_read")
    return cpu.kv4_read(codes, affine, head_dim, dtype)


@kv4_read.register_kernel("cuda")
def _(codes: Tensor, affine: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    from qpcompile.kernels.kv4_read import triton

    check_cache(codes, affine, head_dim, "qpcompile::kv4_read")
    return triton.kv4_read(codes, affine, head_dim, dtype)


@kv4_read.register_fake
def _(codes: Tensor, affine: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    check_cache(codes, affine, head_dim, "qpcompile::kv4_read")
    return codes.new_empty((*codes.shape[:-1], head_dim), dtype=dtype)


def check_cache(codes: Tensor, affine: Tensor, head_dim: int, where: str) -> None:
    """Refuse codes and scales that kv4_write did not make for this head size."""
    plane = (head_dim + 1) // 2
    packed = codes.dim() == 4 and codes.dtype == torch.uint8 and codes.shape[-1] == plane
    if not packed or affine.dim() != 4 or affine.shape[-1] != 2 or affine.dtype != torch.float32:
        raise KernelError(
            f"a 4-bit cache for head size {head_dim} is u8[B, H, S, {plane}] with f32[B, H, S, 2], "
            f"got {codes.dtype} {tuple(codes.shape)} with {affine.dtype} {tuple(affine.shape)}",
            where=where,
            do="pass both outputs of qpcompile::kv4_write, and the head size they were written with",
        )


OVERLOAD = torch.ops.qpcompile.kv4_read.default
