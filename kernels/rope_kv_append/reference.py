"""`rope_kv_write` of a decode step, whose codes and scales are appended to those of the tokens before it.

q', *new = rope_kv_write(q, k, v, cos, sin, rotate, k_bits, v_bits);   each part of the cache is cat([past, new])
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpcompile.kernels.rope_kv_write import reference
from qpcompile.kernels.rope_kv_write.reference import Written

PARTS = ("k_codes", "k_affine", "v_codes", "v_affine")


def rope_kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    *past: Tensor | None,
) -> Written:
    """Operands as in rope_kv_write; past: codes u8[B, Hkv, P, D bits / 8], affine f32[B, Hkv, P, 2] of keys and values,
    then `center`, which may be left out.

    Returns `Written` with P + S tokens.
    """
    parts, center = divided(past)
    return appended(reference.rope_kv_write(q, k, v, cos, sin, rotate, k_bits, v_bits, center), parts)


def divided(past: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The four parts of a cache, and the operand after them."""
    *parts, center = past if len(past) > len(PARTS) else (*past, None)
    return tuple(part for part in parts if part is not None), center


def appended(written: Written, past: tuple[Tensor, ...]) -> Written:
    """The query, and the parts of the cache joined with those of the tokens before."""
    y, *new = written
    first, second, third, fourth = (torch.cat(parts, dim=2) for parts in zip(past, new, strict=True))
    return y, first, second, third, fourth
