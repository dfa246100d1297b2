"""`qpcompile::attention_kv4`: attention that reads packed 4-bit keys and values."""

import torch
from torch import Tensor

from qpcompile.kernels.attention_kv4 import cpu
from qpcompile.kernels.attention_kv4.rule import RULE

WHERE = "qpcompile::attention_kv4"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
def attention_kv4(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    filled: Tensor | None = None,
) -> Tensor:
    """q: f[B, Hq, Sq, D], codes: u8[B, Hkv, S, ceil(D / 2)], affine: f32[B, Hkv, S, 2] -> q.dtype[B, Hq, Sq, D].

    mask: f or bool [B | 1, 1 | Hq, Sq, S]; None lets every query see every key. A fully masked row is 0.
    filled: i64[1], the number of valid keys; slots after them are neither read nor attended to. None: all S.
    """
    return cpu.attention_kv4(q, k_codes, k_affine, v_codes, v_affine, mask, scale, filled)


@attention_kv4.register_kernel("cuda")
def _(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    filled: Tensor | None = None,
) -> Tensor:
    from qpcompile.kernels.attention_kv4 import triton

    RULE.check(q, k_codes, k_affine, v_codes, v_affine, mask, scale, filled)
    return triton.attention_kv4(q, k_codes, k_affine, v_codes, v_affine, mask, scale, filled)


@attention_kv4.register_fake
def _(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    filled: Tensor | None = None,
) -> Tensor:
    RULE.check(q, k_codes, k_affine, v_codes, v_affine, mask, scale, filled)
    batch, heads, rows, head_dim = q.shape
    return q.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)


OVERLOAD = torch.ops.qpcompile.attention_kv4.default
