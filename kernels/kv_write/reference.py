"""Quantize keys or values for the cache: unsigned codes of 4 or 8 bits, a scale and a zero point per token and head.

    lo = min(min x, 0), hi = max(max x, 0), scale = (hi - lo) / h, zero = round(-lo / scale)
    code = clamp(round(x / scale) + zero, 0, h), h = 15 or 255

8-bit codes take a byte each. Of 4-bit codes, byte j of a token and head holds code j in its low and code P + j in its
high nibble, P = ceil(D / 2); an odd D leaves the last high nibble 0. Tokens are quantized independently, so that
dropping tokens is a gather of codes.

Source: FlatQuant, KV-cache quantization after the rotary embedding (arXiv 2410.09426); QServe, KV4 (arXiv 2405.04532).
"""

import torch
from torch import Tensor

BITS = (4, 8)


def kv_write(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[B, H, S, D] -> codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2] with scale and zero point."""
    highest = 2**bits - 1
    values = x.float().contiguous()
    low = values.amin(-1, keepdim=True).clamp(max=0)
    span = values.amax(-1, keepdim=True).clamp(min=0) - low
    # Divided by a tensor: CUDA turns division by a Python scalar into multiplication by its reciprocal.
    scale = span / torch.full_like(span, highest)
    scale = torch.where(scale == 0, 1.0, scale)
    zero = torch.round(-low / scale)
    codes = torch.clamp(torch.round(values / scale) + zero, 0, highest).to(torch.uint8)
    return pack_planes(codes) if bits == 4 else codes, torch.cat([scale, zero], dim=-1)


def pack_planes(codes: Tensor) -> Tensor:
    """codes: u8[..., D], each in 0..15 -> u8[..., ceil(D / 2)]."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)
