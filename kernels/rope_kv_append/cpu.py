"""CPU kernel of rope_kv_append. Bound graphs append in place instead (runtime/cpu/bind.py)."""

from __future__ import annotations

from torch import Tensor

from qpcompile.kernels.rope_kv_append.reference import appended, divided
from qpcompile.kernels.rope_kv_append.rule import RULE
from qpcompile.kernels.rope_kv_write import cpu
from qpcompile.kernels.rope_kv_write.reference import Written


@RULE.checked
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
    """Shapes as in reference.py."""
    parts, center = divided(past)
    return appended(cpu.rope_kv_write(q, k, v, cos, sin, rotate, k_bits, v_bits, center), parts)
