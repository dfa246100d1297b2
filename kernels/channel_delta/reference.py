"""The delta rule with a decay per key channel: linear attention that forgets each channel at its own rate.

    S_t = diag(a_t) S_{t-1} + k_t (b_t (v_t - (diag(a_t) S_{t-1})^T k_t))^T      a_t = exp(decay_t)
    y_t = S_t^T q_t

Source: "Kimi Linear: An Expressive, Efficient Attention Architecture", section 3 (arXiv 2510.26692).
"""

import torch
from torch import Tensor


def channel_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after the other.

    Args:
        q, k: f[B, S, H, D]; v: f[B, S, H, E]; decay: f[B, S, H, D], at most 0; beta: f[B, S, H];
        state: f32[B, H, D, E].
    Returns:
        y of q's type [B, S, H, E], and the state after the last token, f32[B, H, D, E].
    """
    y = [v.float()[:, :0]]
    for t in range(q.shape[1]):
        query, key, value, faded = (each[:, t].float() for each in (q, k, v, decay))
        state = state * faded.exp()[..., None]
        missing = value - (state * key[..., None]).sum(dim=-2)
        state = state + key[..., None] * (beta[:, t].float()[..., None] * missing)[..., None, :]
        y.append((state * query[..., None]).sum(dim=-2)[:, None])
    return torch.cat(y, dim=1).to(q.dtype), state.clone()
