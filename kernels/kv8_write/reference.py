"""Quantize keys or values for the 8-bit cache: unsigned codes with a scale and a zero point per token and head.

    lo = min(min x, 0), hi = max(max x, 0), scale = (hi - lo) / 255, zero = round(-lo / scale)
    code = clamp(round(x / scale) + zero, 0, 255)

Like the 4-bit cache with more levels: one code per byte, and tokens are quantized independently.
Source: FlatQuant, KV-cache quantization after the rotary embedding (arXiv 2410.09426).
"""

import torch
from torch import Tensor


def kv8_write(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, D], affine: f32[B, H, S, 2] with scale and zero point."""
    values = x.float().contiguous()
    low = values.amin(-1, keepdim=True).clamp(max=0)
    span = values.amax(-1, keepdim=True).clamp(min=0) - low
    # Divided by a tensor: CUDA turns division by a Python scalar into multiplication by its reciprocal.
    scale = span / torch.full_like(span, 255)
    scale = torch.where(scale == 0, 1.0, scale)
    zero = torch.round(-low / scale)
    codes = torch.clamp(torch.round(values / scale) + zero, 0, 255).to(torch.uint8)
    return codes, torch.cat([scale, zero], dim=-1)
