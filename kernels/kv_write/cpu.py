"""CPU kernel of kv_write: one C call, or the reference."""

import torch
from torch import Tensor

from qpcompile.kernels.kv_write import reference
from qpcompile.kernels.kv_write.rule import RULE
from qpcompile.kernels.native import library as native


@RULE.checked
def kv_write(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2]."""
    return (_native if native.takes(x) else reference.kv_write)(x, bits)


def _native(x: Tensor, bits: int, level: int | None = None) -> tuple[Tensor, Tensor]:
    # The last axis must be contiguous; heads and tokens may have any strides, as projections leave them.
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, head_dim = x.shape
    codes = torch.empty((batch, heads, length, (head_dim * bits + 7) // 8), dtype=torch.uint8)
    affine = torch.empty((batch, heads, length, 2), dtype=torch.float32)
    native.call("kv_write", x, codes, affine, *x.shape, bits, level=level)
    return codes, affine
