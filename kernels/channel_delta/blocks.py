"""channel_delta in chunks of tokens, as kernels/gated_delta/blocks.py; pairs of tokens are compared by channel."""

import torch
from torch import Tensor

# A chunk compares CHUNK^2 pairs in D channels at a time.
CHUNK = 32


def channel_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in reference.py."""
    queries, keys, values = (each.float().transpose(1, 2) for each in (q, k, v))
    decays, betas = (each.float().transpose(1, 2) for each in (decay, beta))
    y = state.new_empty(*queries.shape[:3], v.shape[3])
    state = state.clone()
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        q_part, k_part, v_part, decay_part, beta_part = (
            each[:, :, part] for each in (queries, keys, values, decays, betas)
        )
        y[:, :, part], state = _chunk(q_part, k_part, v_part, decay_part, beta_part, state)
    return y.transpose(1, 2).contiguous().to(q.dtype), state


def _chunk(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk, f32[B, H, C, ...]; returns its rows and the state after it."""
    total = decay.cumsum(dim=-2)
    faded = total.exp()
    later = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).triu(1)
    apart = total[..., :, None, :] - total[..., None, :, :]
    keys = k[..., None, :, :] * apart.masked_fill(later[..., None], float("-inf")).exp()
    system = (beta[..., None] * (k[..., :, None, :] * keys).sum(dim=-1)).tril(-1)
    asked = beta[..., None] * (v - (k * faded) @ state)
    unit = torch.eye(k.shape[2], device=k.device)
    written = torch.linalg.solve_triangular(system + unit, asked, upper=False, unitriangular=True)
    y = (q * faded) @ state + (q[..., :, None, :] * keys).sum(dim=-1) @ written
    rest = (total[..., -1:, :] - total).exp()
    return y, state * faded[..., -1, :, None] + (k * rest).mT @ written
