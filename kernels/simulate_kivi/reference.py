"""Simulation of KIVI's cache: keys or values quantized and dequantized, stored in their own type.

    keys     per channel: asymmetric min and max over groups of 32 tokens
    values   per token: asymmetric min and max over groups of 32 channels
    the last 128 tokens, and keys beyond the last full group, are not quantized

A key's scale depends on neighbouring tokens in the cache: dropping tokens regroups them.
Source: "KIVI" (arXiv 2402.02750), section 3, and its released code.
"""

import torch
from torch import Tensor

GROUP, RESIDUAL = 32, 128


def simulate_kivi(x: Tensor, levels: int, key: bool, residual: int = RESIDUAL) -> Tensor:
    """x: f[B, H, S, D], codes 0..levels -> x.dtype[B, H, S, D]."""
    settled = max(x.shape[2] - residual, 0)
    if key:
        settled -= settled % GROUP
    old, new = x[:, :, :settled].float(), x[:, :, settled:]
    if key:
        rounded = _round_trip(old.unflatten(2, (-1, GROUP)), 3, levels).flatten(2, 3) if settled else old
    else:
        width = old.shape[-1]
        parts = [_round_trip(part, -1, levels) for part in old.split(min(GROUP, width), dim=-1)]
        rounded = torch.cat(parts, dim=-1)
    return torch.cat([rounded.to(x.dtype), new], dim=2)


def _round_trip(x: Tensor, axis: int, levels: int) -> Tensor:
    low = x.amin(axis, keepdim=True)
    scale = (x.amax(axis, keepdim=True) - low) / levels
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.clamp(torch.round((x - low) / scale), 0, levels) * scale + low
