"""Rotary position embedding on the two halves of a head: y = x cos + (-x2, x1) sin, x = (x1, x2).

Source: "RoFormer" (arXiv 2104.09864), section 3.4.2, with the pairs (i, i + D / 2) that transformers rotates.
"""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: f[..., D], cos, sin: f[..., D], broadcast to x -> x.dtype[..., D]; computed in float32 and rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)
