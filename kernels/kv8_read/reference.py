"""Dequantize keys or values from the 8-bit cache: x = (code - zero) * scale.

Source: FlatQuant, KV-cache quantization (arXiv 2410.09426).
"""

import torch
from torch import Tensor


def kv8_read(codes: Tensor, affine: Tensor, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, D], affine: f32[B, H, S, 2] -> dtype[B, H, S, D]."""
    scale, zero = affine.split(1, dim=-1)
    return ((codes.float() - zero) * scale).to(dtype)
