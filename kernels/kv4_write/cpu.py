"""CPU kernel of kv4_write: one C call, or the reference."""

import torch
from torch import Tensor

from qpcompile.kernels.kv4_write import reference
from qpcompile.kernels.kv4_write.rule import RULE
from qpcompile.kernels.native import library as native


@RULE.checked
def kv4_write(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, ceil(D / 2)], affine: f32[B, H, S, 2]."""
    return (_native if native.takes(x) else reference.kv4_write)(x)


def _native(x: Tensor, level: int | None = None) -> tuple[Tensor, Tensor]:
    # The last axis must be contiguous; heads and tokens may have any strides, as projections leave them.
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, head_dim = x.shape
    codes = torch.empty((batch, heads, length, (head_dim + 1) // 2), dtype=torch.uint8)
    affine = torch.empty((batch, heads, length, 2), dtype=torch.float32)
    native.call("kv4_write", x, codes, affine, *x.shape, level=level)
    return codes, affine
