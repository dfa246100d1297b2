"""Static 4-bit quantization of activations, with one calibrated scale per modality of token.

    code = clamp(round(x / scale), -8, 7)

The graph selects each token's scale (visual or text), so that the integer linear takes it like a dynamic per-token
scale.
Source: MQuant, modality-specific static quantization, section 3.2, arXiv 2502.00425.
"""

import torch
from torch import Tensor

from qpcompile.kernels.quantize_dynamic.reference import HIGHEST, LOWEST


def quantize_static(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[..., C], scale: f32[1] or f32[..., 1] -> q: i8[..., C], scale: f32[..., 1], one per token."""
    codes = torch.clamp(torch.round(x.float() / scale), LOWEST, HIGHEST).to(torch.int8)
    return codes.contiguous(), scale.expand(*x.shape[:-1], 1).contiguous().clone()
