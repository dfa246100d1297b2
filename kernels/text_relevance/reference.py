"""Score each visual token by its relevance to the question, from embeddings alone.

    c_i = mean over t in T of cos(x_i, x_t)           T: text tokens after the row's first picture token
    r_i = (s c_i - min + 1e-6) / (max - min + 1e-6)   s = +1 or -1; min and max of s c over the row's visual tokens

CDPruner and TRIM measure c between CLIP's image and text embeddings and use s = -1, since there the cosine of a patch
is high where the patch does not show what the text names. VLM checkpoints contain no text tower, so c is a substitute,
measured at the decoder's input, and s is configurable. Rows without text or with equal tokens get 1 everywhere.

Source: CDPruner (arXiv 2506.10967), section 3, for the shape of r; the substitute, and the 1e-6 in the denominator, are
ours.
"""

import torch
from torch import Tensor

from qpcompile.kernels.dpp_select.reference import unit_rows

MARGIN = 1e-6


def text_relevance(hidden: Tensor, visual: Tensor, valid: Tensor, sign: int) -> Tensor:
    """hidden: f[B, S, C], visual, valid: bool[B, S] -> f32[B, S] above 0 up to 1; 0 where a token is not visual."""
    unit = unit_rows(hidden)
    counted = visual & valid
    text = (valid & ~visual & (counted.cumsum(1) > 0)).double()
    # The mean of cosines is the product with the mean of the unit rows.
    mean = (text[:, None] @ unit) / text.sum(1).clamp(min=1)[:, None, None]
    cosine = sign * (unit @ mean.mT).squeeze(2)
    return rescale(cosine, counted, MARGIN).float()


def rescale(values: Tensor, counted: Tensor, margin: float) -> Tensor:
    """values: f[B, S], counted: bool[B, S] -> (v - min + margin) / (max - min + margin) of a row's counted, else 0."""
    low = torch.where(counted, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(counted, values, -torch.inf).amax(1, keepdim=True)
    return torch.where(counted, (values - low + margin) / (high - low + margin), 0.0)
