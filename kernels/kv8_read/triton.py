"""GPU kernel of kv8_read: the kernel of kv4_read with one code per byte."""

import torch
from torch import Tensor

from qpcompile.kernels.kv4_read.triton import kv_read


def kv8_read(codes: Tensor, affine: Tensor, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, D], affine: f32[B, H, S, 2] -> dtype[B, H, S, D]."""
    return kv_read(codes, affine, codes.shape[-1], dtype)
