"""CPU attention over a whole prompt: AMX tiles for bfloat16 if the processor has them, otherwise torch's kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qpcompile.kernels.attention.rule import RULE
from qpcompile.kernels.native import library as native

# Below these sizes packing keys into tile layout costs more than it saves.
QUERIES, KEYS = 16, 32


@RULE.checked
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q: f[B, Hq, S, D], k, v: f[B, Hkv, T, D], mask: bool or f, broadcast to [B, Hq, S, T] -> q.dtype[B, Hq, S, D].

    Raises KernelError for other operands, including zero heads: torch divides by their number, which kills the process.
    """
    alike = k.dtype == v.dtype == q.dtype and k.shape == v.shape
    if alike and on_tiles(q, k.shape[2], mask, scale):
        return _on_tiles(q, k, v, mask, scale)
    return fused(q, k, v, mask, scale)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same by torch, with gradients, on operands that are already checked."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def on_tiles(q: Tensor, keys: int, mask: Tensor | None, scale: float) -> bool:
    """Whether `attention` takes these queries to AMX tiles."""
    fits = q.dtype == torch.bfloat16 and q.device.type == "cpu" and (mask is None or mask.dtype == torch.bool)
    large = fits and q.dim() == 4 and q.shape[2] >= QUERIES and keys >= KEYS
    return large and scale > 0 and native.available() and native.library().amx


def _on_tiles(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    # The last axis must be contiguous; heads and tokens may have any strides, as projections leave them.
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    batch, heads, queries, size = q.shape
    groups, keys = k.shape[1:3]
    y = torch.empty((batch, queries, heads, size), dtype=q.dtype).transpose(1, 2)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    native.call("attention_amx", q, k, v, mask, y, batch, heads, groups, queries, keys, size, scale)
    return y
