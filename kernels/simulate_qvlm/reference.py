"""Simulation of Q-VLM's quantizer in floating point.

    activations   per input channel over tokens, asymmetric: scale_c = (hi_c - lo_c) / 15, codes 0..15, dequantized
    weights       NF4: 16 levels, one absolute maximum per block of 64 along the inputs, dequantized

A scale per input channel varies along the reduction axis, so no integer kernel can factor it out: this only reproduces
published settings. Not implemented: running ranges in decode and the shrinking search; ranges are those of the
calibration tokens, block scales are float32 (no double quantization).

Sources: "Q-VLM" (arXiv 2410.08119) and its released code; NF4: "QLoRA" (arXiv 2305.14314), section 3 and appendix E.
"""

import torch
from torch import Tensor

BLOCK = 64
LEVELS = 15


def simulate_qvlm(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x: f[..., C], low <= high: f32[C], the range of each channel -> x.dtype[..., C]."""
    scale = (high - low) / LEVELS
    scale = torch.where(scale <= 0, 1.0, scale)
    codes = torch.clamp(torch.round((x.float() - low) / scale), 0, LEVELS)
    return (codes * scale + low).to(x.dtype)


def nf4(weight: Tensor) -> Tensor:
    """weight: f[N, K] -> f[N, K], each value the nearest of 16 levels times the absolute maximum of its block."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK))
    blocks = padded.view(rows, -1, BLOCK)
    largest = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
    levels = nf4_levels().to(weight.device)
    nearest = torch.bucketize(blocks / largest, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * largest).view(rows, -1)[:, :columns].to(weight.dtype).contiguous()


def nf4_levels() -> Tensor:
    """f32[16], increasing from -1 to 1 with an exact 0: quantiles of a normal distribution, 7 below 0, 8 above."""
    edge = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (values / values.abs().max()).float()
