"""Root-mean-square norm: y = cast(x / sqrt(mean(x^2) + eps)) * weight.

Source: "Root Mean Square Layer Normalization", section 4 (arXiv 1910.07467), computed in float32 as decoders do,
or in float64 where x is.
"""

import torch


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: f[..., C]; weight: f[C]; returns f[..., C] in the type of x times weight."""
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
