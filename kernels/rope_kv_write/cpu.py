"""CPU kernel of rope_kv_write: one C call, or the kernels of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.cpu import hadamard
from qpcompile.kernels.kv_write.cpu import kv_write
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import rotation
from qpcompile.kernels.rope.cpu import rope
from qpcompile.kernels.rope_kv_write.reference import Written, composed
from qpcompile.kernels.rope_kv_write.rule import RULE


@RULE.checked
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
    """Shapes as in reference.py."""
    if all(native.computes(each, cos, sin) for each in (q, k, v)):
        return _native(q, k, v, cos, sin, rotate, k_bits, v_bits, center)
    return composed(q, k, v, cos, sin, rotate, k_bits, v_bits, center, rope, lambda x: hadamard(x, None), kv_write)


def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    center: Tensor | None = None,
    level: int | None = None,
) -> Written:
    # The last axis must be contiguous; heads and tokens may have any strides, as projections leave them.
    q, k, v = (each if each.stride(3) == 1 else each.contiguous() for each in (q, k, v))
    batch, heads, tokens, size = q.shape
    groups = k.shape[1]
    tables = [None if each is None else _table(each).expand(batch, 1, tokens, size) for each in (cos, sin)]
    left, right, tiles = rotation(size, q.dtype == torch.bfloat16 and level is None) if rotate else (None, None, None)
    y = torch.empty((batch, heads, tokens, size), dtype=q.dtype)
    cache = [
        torch.empty((batch, groups, tokens, width), dtype=dtype)
        for bits in (k_bits, v_bits)
        for width, dtype in ((size * bits // 8, torch.uint8), (2, torch.float32))
    ]
    sides = (0, 0) if left is None or right is None else (len(left), len(right))
    center = None if center is None else center.float().contiguous()
    sizes = batch, heads, groups, tokens, size, *sides, k_bits, v_bits
    native.call(
        *("rope_kv_write_" + native.real(q), q, k, v, *tables, y, *cache, left, right, tiles, center, *sizes),
        level=level,
    )
    return y, cache[0], cache[1], cache[2], cache[3]


def _table(table: Tensor) -> Tensor:
    return table if table.stride(3) == 1 else table.contiguous()
