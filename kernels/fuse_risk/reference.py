"""Combine the quantization risk of visual tokens with another method's score.

    fused_i = a score_i + (1 - a) risk_i          a = alpha, or by row:
    a = alpha - 0.1 clip((CV - 0.2) / 1.0, 0, 1)  CV = std / mean of the row's risks, std with n - 1

Tokens that are not counted keep their score. With a = 1 counted tokens do too, bit for bit.

Source: QAPruner (arXiv 2604.02816), section 3; the rule for alpha, 0.55 in the paper, is from its code.
"""

import torch
from torch import Tensor

from qpcompile.kernels.text_relevance.reference import rescale

MARGIN = 1e-8
CALM, SPAN, DEPTH = 0.2, 1.0, 0.1


def fuse_risk(scores: Tensor, risk: Tensor, counted: Tensor, alpha: float, dynamic: bool, minmax: bool) -> Tensor:
    """scores, risk: f32[B, S], counted: bool[B, S] -> f32[B, S]; minmax: normalize the scores to 0..1 first."""
    ours = rescale(scores.double(), counted, MARGIN) if minmax else scores.double()
    share = dynamic_alpha(risk, counted, alpha) if dynamic else alpha
    return torch.where(counted, share * ours + (1 - share) * risk.double(), scores.double()).float()


def dynamic_alpha(risk: Tensor, counted: Tensor, alpha: float) -> Tensor:
    """risk: f32[B, S], counted: bool[B, S] -> f64[B, 1]."""
    count = counted.sum(1, keepdim=True)
    mean = torch.where(counted, risk.double(), 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(counted, (risk.double() - mean).square(), 0.0).sum(1, keepdim=True)
    spread = (squares / (count - 1).clamp(min=1)).sqrt() / (mean + MARGIN)
    return alpha - DEPTH * ((spread - CALM) / SPAN).clamp(0, 1)
