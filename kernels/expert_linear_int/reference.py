"""Linear layers of a mixture of experts on codes: an exact integer product per slot, in plain torch.

    y[n, j] = linear_int(q[n, i], scale[n, i], weight[e], weight_scale[e])     e = index[n, j], i = j // (J / I)

q: I rows per token, index: J slots per token. The product, its scaling and its order are those of linear_int.
Source: "Outrageously Large Neural Networks", section 2 (arXiv 1701.06538), on the codes of linear_int.
"""

import torch
from torch import Tensor

from qpcompile.kernels.linear_int.reference import linear_int


def expert_linear_int(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, index: Tensor, dtype: torch.dtype, bits: int = 8
) -> Tensor:
    """q: i8[N, I, K], scale: f32[N, I, G], weight: u8[E, O, ceil(K/2)] | i8[E, O, K], weight_scale: f32[E, O, Gw],
    index: i[N, J] with values 0..E-1, J a multiple of I -> f[N, J, O].

    G and Gw are equal, or one of them is 1. bits: of the codes q; of no effect on the result.
    """
    repeats = index.shape[1] // q.shape[1]
    rows, steps = (each.repeat_interleave(repeats, dim=1) for each in (q, scale))
    pairs = zip(weight, weight_scale, strict=True)
    every = torch.stack([linear_int(rows, steps, own, own_scale, None, dtype, bits) for own, own_scale in pairs])
    return every.gather(0, index.long()[None, ..., None].expand(1, *every.shape[1:]))[0]
