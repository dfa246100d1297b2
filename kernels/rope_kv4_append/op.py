"""qpcompile::rope_kv4_append: rope_kv4_write of a decode step, appended to the cache."""

import torch
from torch import Tensor

from qpcompile.kernels.rope_kv4_append import cpu
from qpcompile.kernels.rope_kv4_append.rule import RULE
from qpcompile.kernels.rope_kv4_write.op import CENTER, RESULTS, SCHEMA


@torch.library.custom_op(
    "qpcompile::rope_kv4_append",
    mutates_args=(),
    device_types="cpu",
    schema=f"({SCHEMA}, Tensor k_codes, Tensor k_affine, Tensor v_codes, Tensor v_affine, {CENTER}) -> {RESULTS}",
)
def rope_kv4_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, rotate: bool, *past: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q: f[B, Hq, S, D], k, v: f[B, Hkv, S, D], D even, cos, sin: f[B | 1, 1, S | 1, D], past: codes u8[B, Hkv, P, D /
    2] and affine f32[B, Hkv, P, 2] of keys and of values, then perhaps center: f[1, Hkv, 1, D] -> `Written` of
    rope_kv4_write with P + S tokens.
    """
    return cpu.rope_kv4_append(q, k, v, cos, sin, rotate, *past)


@rope_kv4_append.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, rotate: bool, *past: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from qpcompile.kernels.rope_kv4_write import triton

    RULE.check(q, k, v, cos, sin, rotate, *past)
    return triton.rope_kv4_append(q, k, v, cos, sin, rotate, *past)


@rope_kv4_append.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, rotate: bool, *past: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return RULE.fake(q, k, v, cos, sin, rotate, *past)


OVERLOAD = torch.ops.qpcompile.rope_kv4_append.default
