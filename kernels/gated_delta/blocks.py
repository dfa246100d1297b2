"""gated_delta in chunks of tokens: what a chunk writes solves one triangular system, without a loop over tokens."""

import torch
from torch import Tensor

CHUNK = 64


def gated_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in reference.py."""
    queries, keys, values = (each.float().transpose(1, 2) for each in (q, k, v))
    decays, betas = (each.float().transpose(1, 2) for each in (decay, beta))
    y = queries.new_empty(*queries.shape[:3], v.shape[3])
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
    total = decay.cumsum(dim=-1)
    faded = total.exp()[..., None]
    between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    system = (beta[..., None] * (k @ k.mT) * between).tril(-1)
    asked = beta[..., None] * (v - faded * (k @ state))
    written = torch.linalg.solve_triangular(
        system + torch.eye(k.shape[2], device=k.device), asked, upper=False, unitriangular=True
    )
    y = faded * (q @ state) + ((q @ k.mT) * between) @ written
    rest = (total[..., -1:] - total).exp()[..., None]
    return y, state * faded[..., -1:, :] + (k * rest).mT @ written
