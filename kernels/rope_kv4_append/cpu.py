"""CPU kernel of rope_kv4_append. Bound graphs append in place instead (runtime/cpu/bind.py)."""

from __future__ import annotations

from torch import Tensor

from qpcompile.kernels.rope_kv4_append.reference import appended, divided
from qpcompile.kernels.rope_kv4_append.rule import RULE
from qpcompile.kernels.rope_kv4_write import cpu
from qpcompile.kernels.rope_kv4_write.reference import Written


@RULE.checked
def rope_kv4_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, rotate: bool, *past: Tensor | None
) -> Written:
    """Shapes as in reference.py."""
    parts, center = divided(past)
    return appended(cpu.rope_kv4_write(q, k, v, cos, sin, rotate, center), parts)
