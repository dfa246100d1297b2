"""The gated delta rule: linear attention whose state forgets, and corrects what it holds under a key.

    S_t = a_t S_{t-1} + k_t (b_t (v_t - a_t S_{t-1}^T k_t))^T      a_t = exp(decay_t)
    y_t = S_t^T q_t

Source: "Gated Delta Networks", section 3.1 (arXiv 2412.06464).
"""

import torch
from torch import Tensor


def gated_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after the other.

    Args:
        q, k: f[B, S, H, D]; v: f[B, S, H, E]; decay, beta: f[B, S, H], decay at most 0; state: f32[B, H, D, E].
    Returns:
        y of q's type [B, S, H, E], and the state after the last token, f32[B, H, D, E].
    """
    y = [v.float()[:, :0]]
    for t in range(q.shape[1]):
        query, key, value = (each[:, t].float() for each in (q, k, v))
        state = state * decay[:, t].float().exp()[..., None, None]
        missing = value - (state * key[..., None]).sum(dim=-2)
        state = state + key[..., None] * (beta[:, t].float()[..., None] * missing)[..., None, :]
        y.append((state * query[..., None]).sum(dim=-2)[:, None])
    return torch.cat(y, dim=1).to(q.dtype), state.clone()
