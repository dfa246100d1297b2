"""Search per-channel input scales for the least output error of quantized linears (AWQ, MBQ).

    s = (mean |x|)^t / sqrt(max s min s)        t of 0, 1/20, ..., 19/20        x' = T (x / s)      W' = W diag(s) T^-1
    awq    min over t of  mean over tokens | W x - Q(W') Q(x') |^2
    mbq    the same with  |.| instead of its square, and token weights: 1 for text, rho for visual tokens

Q(x') is x' if activations stay in 16 bits. rho comes from gradients (`modality_ratios`).

Sources: "AWQ" (arXiv 2306.00978), section 3.2; "MBQ" (arXiv 2412.19509), section 3.2, where text tokens are all tokens
that are not visual.
"""

from __future__ import annotations

import torch

from qpcompile.quantization.fake_quant import round_trip
from qpcompile.recipe.quantize import QuantizeScheme

STEPS = 20
SMALLEST = 1e-5


def search_scale(
    rows: torch.Tensor, weights: torch.Tensor, turn: torch.Tensor, scheme: QuantizeScheme, importance: torch.Tensor
) -> torch.Tensor:
    """rows: f[R, C] calibration tokens, weights: f[N, C], turn: f[C, C] orthogonal, importance: f[R] -> 1 / s: f64[C].

    importance: the weight of each token's error; all ones for awq.
    """
    x, wide = rows.float(), weights.float()
    exact, rotation = x @ wide.T, turn.float()
    typical = x.abs().mean(dim=0).clamp(min=SMALLEST)
    best, least = torch.ones_like(typical), torch.inf
    for step in range(STEPS):
        scale = typical.pow(step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        inputs = (x / scale) @ rotation.T
        if (given := scheme.activations).bits != 16:
            inputs = round_trip(inputs, given.kernel_group, given.clip_ratio, given.bits)
        rounded = round_trip((wide * scale) @ rotation.T, scheme.weights.kernel_group, 1.0, scheme.weights.bits)
        error = (inputs @ rounded.T - exact).abs()
        cost = error.mean(dim=-1) if scheme.scaling == "mbq" else error.pow(2).mean(dim=-1)
        total = float((cost * importance).sum())
        if total < least:
            best, least = scale, total
    return 1 / best.double()
