"""Round activations to 4 bits with scales that were fixed before: one for each kind of token.

    code = clamp(round(x / scale), -8, 7)

Which scale a token has is not this operator's business: the graph selects it (visual or text), so that the integer
linear takes it as it takes a scale that was found per token.
Source: MQuant, modality-specific static quantization, section 3.2, arXiv 2502.00425.
"""

import torch
from torch import Tensor

from qpcompile.kernels.quantize_int4.reference import HIGHEST, LOWEST


def quantize_int4_static(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x: f[..., C], scale: f32[1] or f32[..., 1] -> q: i8[..., C], scale: f32[..., 1], one per token."""
    codes = torch.clamp(torch.round(x.float() / scale), LOWEST, HIGHEST).to(torch.int8)
    return codes.contiguous(), scale.expand(*x.shape[:-1], 1).contiguous().clone()
