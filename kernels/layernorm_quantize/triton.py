"""GPU kernel of layernorm_quantize: the kernel of rmsnorm_quantize with the token centred first."""

from torch import Tensor

from qpcompile.kernels.rmsnorm_quantize.triton import norm_quantize


def layernorm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    transform_scale: Tensor | None,
    rotate: bool,
    group_size: int,
    clip_ratio: float,
) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight, bias: f[C], transform_scale: f32[C] -> q: i8[..., C], scale: f32[..., G]."""
    return norm_quantize(x, weight, bias, eps, transform_scale, rotate, group_size, clip_ratio)
