"""Rotary embedding and Hadamard rotation of queries and keys, and keys and values quantized for the cache.

    q' = hadamard(rope(q))
    k_codes, k_affine = kv_write(hadamard(rope(k)) - center, k_bits)
    v_codes, v_affine = kv_write(v, v_bits)

The composition of `rope`, `hadamard` and `kv_write`, with their rounding in half precision. Without tables there is no
rotary embedding, without `rotate` no rotation: keys and queries are rotated alike, so that their products are the same.
`center` is one vector per key head, which changes all products of a query by the same number: a softmax over them is
the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.reference import hadamard
from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.kernels.rope.reference import rope

Written = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q: f[B, Hq, S, D], then codes: u8[B, Hkv, S, D bits / 8] and affine: f32[B, Hkv, S, 2] of keys and of values."""


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    center: Tensor | None = None,
) -> Written:
    """q: f[B, Hq, S, D], k, v: f[B, Hkv, S, D], D even, cos, sin: f[B | 1, 1, S | 1, D], center: f[1, Hkv, 1, D] ->
    `Written`.
    """
    return composed(q, k, v, cos, sin, rotate, k_bits, v_bits, center, rope, hadamard, kv_write)


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    center: Tensor | None,
    turn: Callable[[Tensor, Tensor, Tensor], Tensor],
    change: Callable[[Tensor], Tensor],
    write: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> Written:
    """The composition of the three parts; rows in float64 hold float32 values, and only their rotation sums in it."""
    kind = q.dtype
    narrow = torch.float32 if kind == torch.float64 else kind
    q, k, v = (each.to(narrow) for each in (q, k, v))
    if cos is not None and sin is not None:
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    if rotate:
        q, k = (change(each.to(kind)).to(narrow) for each in (q, k))
    if center is not None:
        k = k - center.to(narrow)
    return q.to(kind).contiguous(), *write(k, k_bits), *write(v, v_bits)
