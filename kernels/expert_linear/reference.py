"""Linear layers of a mixture of experts: each slot of a token is multiplied by the weight of the expert it chose.

    y[n, j] = W[index[n, j]] x[n, j // (J / I)]     x: I rows per token, index: J slots per token

Source: "Outrageously Large Neural Networks", section 2 (arXiv 1701.06538).
"""

import torch
from torch import Tensor


def expert_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """x: f[N, I, C], weight: f[E, O, C], index: i[N, J] with values 0..E-1, J a multiple of I -> f[N, J, O].

    Computed in float32, or in float64 where x has it.
    """
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    rows = x.to(wide).repeat_interleave(index.shape[1] // x.shape[1], dim=1)
    return (weight.to(wide)[index] @ rows[..., None])[..., 0].to(x.dtype)
