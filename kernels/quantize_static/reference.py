"""Static quantization of activations to 4 or 8 bits, with one calibrated scale per modality of token.

    code = clamp(round(x / scale), -h - 1, h)      h = 7 for 4 bits, 127 for 8

The graph selects each token's scale (visual or text), so that the integer linear takes it like a dynamic per-token
scale.
Source: MQuant, modality-specific static quantization, section 3.2, arXiv 2502.00425.
"""

from torch import Tensor

from qpcompile.kernels.quantize_dynamic.reference import rounded


def quantize_static(x: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[..., C], scale: f32[1] or f32[..., 1] -> q: i8[..., C], scale: f32[..., 1], one per token."""
    return rounded(x.float() / scale, bits).contiguous(), scale.expand(*x.shape[:-1], 1).contiguous().clone()
