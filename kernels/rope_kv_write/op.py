"""qpcompile::rope_kv_write: rotary embedding, rotation and cache codes of one attention layer's new tokens."""

import torch
from torch import Tensor

from qpcompile.kernels.rope_kv_write import cpu
from qpcompile.kernels.rope_kv_write.rule import RULE

SCHEMA = "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, bool rotate, int k_bits, int v_bits"
"""The first operands, also of rope_kv_append."""
CENTER = "Tensor? center=None"
"""The last operand of both."""
RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op(
    "qpcompile::rope_kv_write", mutates_args=(), device_types="cpu", schema=f"({SCHEMA}, {CENTER}) -> {RESULTS}"
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q: f[B, Hq, S, D], k, v: f[B, Hkv, S, D], D even, cos, sin: f[B | 1, 1, S | 1, D], center: f[1, Hkv, 1, D] ->
    `Written` (reference.py).
    """
    return cpu.rope_kv_write(q, k, v, cos, sin, rotate, k_bits, v_bits, center)


@rope_kv_write.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from qpcompile.kernels.rope_kv_write import triton

    RULE.check(q, k, v, cos, sin, rotate, k_bits, v_bits, center)
    return triton.rope_kv_write(q, k, v, cos, sin, rotate, k_bits, v_bits, center)


@rope_kv_write.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return RULE.fake(q, k, v, cos, sin, rotate, k_bits, v_bits, center)


OVERLOAD = torch.ops.qpcompile.rope_kv_write.default
