"""Dequantize keys or values from the cache: x = (code - zero) * scale.

The packing of 4-bit codes is that of kv_write: byte j holds code j in its low and code P + j in its high nibble.

Source: FlatQuant, KV-cache quantization (arXiv 2410.09426).
"""

import torch
from torch import Tensor


def kv_read(codes: Tensor, affine: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2] -> dtype[B, H, S, D], D = head_dim."""
    scale, zero = affine.split(1, dim=-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # exact in float64
    return ((unpacked(codes, head_dim, bits).to(wide) - zero) * scale).to(dtype)


def unpacked(codes: Tensor, head_dim: int, bits: int) -> Tensor:
    """codes: u8[..., ceil(D bits / 8)] -> u8[..., D], one code per byte."""
    return unpack_planes(codes, head_dim) if bits == 4 else codes.contiguous()


def unpack_planes(codes: Tensor, head_dim: int) -> Tensor:
    """codes: u8[..., ceil(D / 2)] -> u8[..., D], each in 0..15."""
    codes = codes.contiguous()
    return torch.cat([codes & 15, codes >> 4], dim=-1)[..., :head_dim]
