"""`qpcompile::attention_kv`: attention that reads codes of keys and values."""

import torch
from torch import Tensor

from qpcompile.kernels.attention_kv import cpu
from qpcompile.kernels.attention_kv.rule import RULE

WHERE = "qpcompile::attention_kv"


@torch.library.custom_op(WHERE, mutates_args=(), device_types="cpu")
def attention_kv(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    filled: Tensor | None = None,
) -> Tensor:
    """q: f[B, Hq, Sq, D], codes: u8[B, Hkv, S, ceil(D bits / 8)], affine: f32[B, Hkv, S, 2] -> as q.

    mask: f or bool [B | 1, 1 | Hq, Sq, S]; None lets every query see every key. A fully masked row is 0.
    k_bits, v_bits: of the codes of keys and of values, 4 or 8.
    filled: i64[1], the number of valid keys; slots after them are neither read nor attended to. None: all S.
    """
    return cpu.attention_kv(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits, filled)


@attention_kv.register_kernel("cuda")
def _(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    filled: Tensor | None = None,
) -> Tensor:
    from qpcompile.kernels.attention_kv import triton

    RULE.check(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits, filled)
    return triton.attention_kv(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits, filled)


@attention_kv.register_fake
def _(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    filled: Tensor | None = None,
) -> Tensor:
    RULE.check(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits, filled)
    batch, heads, rows, head_dim = q.shape
    return q.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)


OVERLOAD = torch.ops.qpcompile.attention_kv.default
