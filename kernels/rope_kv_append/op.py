"""qpcompile::rope_kv_append: rope_kv_write of a decode step, appended to the cache."""

import torch
from torch import Tensor

from qpcompile.kernels.rope_kv_append import cpu
from qpcompile.kernels.rope_kv_append.rule import RULE
from qpcompile.kernels.rope_kv_write.op import CENTER, RESULTS, SCHEMA


@torch.library.custom_op(
    "qpcompile::rope_kv_append",
    mutates_args=(),
    device_types="cpu",
    schema=f"({SCHEMA}, Tensor k_codes, Tensor k_affine, Tensor v_codes, Tensor v_affine, {CENTER}) -> {RESULTS}",
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q: f[B, Hq, S, D], k, v: f[B, Hkv, S, D], D even, cos, sin: f[B | 1, 1, S | 1, D], past: codes u8[B, Hkv, P, D
    bits / 8] and affine f32[B, Hkv, P, 2] of keys and of values, then perhaps center: f[1, Hkv, 1, D] -> `Written`
    of rope_kv_write with P + S tokens.
    """
    return cpu.rope_kv_append(q, k, v, cos, sin, rotate, k_bits, v_bits, *past)


@rope_kv_append.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    *past: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from qpcompile.kernels.rope_kv_write import triton

    RULE.check(q, k, v, cos, sin, rotate, k_bits, v_bits, *past)
    return triton.rope_kv_append(q, k, v, cos, sin, rotate, k_bits, v_bits, *past)


@rope_kv_append.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate: bool,
    k_bits: int,
    v_bits: int,
    *past: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return RULE.fake(q, k, v, cos, sin, rotate, k_bits, v_bits, *past)


OVERLOAD = torch.ops.qpcompile.rope_kv_append.default
