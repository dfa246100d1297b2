"""`qpcompile::attention_kv4`: attention that reads packed 4-bit keys and values."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.attention_kv4 import cpu
from qpcompile.kernels.kv4_read.op import check_cache

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

    mask: f or bool [B | 1, 1 | Hq, Sq, S]; None lets every query see every key. A row that sees no key is 0.
    filled: i64[1], how many keys there are; what lies behind them is neither read nor seen. None: all S.
    """
    _check(q, k_codes, k_affine, v_codes, v_affine, mask, filled)
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

    _check(q, k_codes, k_affine, v_codes, v_affine, mask, filled)
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
    _check(q, k_codes, k_affine, v_codes, v_affine, mask, filled)
    batch, heads, rows, head_dim = q.shape
    return q.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)


def _check(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    filled: Tensor | None,
) -> None:
    if q.dim() != 4 or not q.is_floating_point() or q.shape[1] % k_codes.shape[1]:
        raise KernelError(
            f"queries {q.dtype} {tuple(q.shape)} do not fit a cache with {k_codes.shape[1]} heads",
            where=WHERE,
            do="give floating-point queries [batch, heads, tokens, head size], heads a multiple of the cache's",
        )
    check_cache(k_codes, k_affine, q.shape[3], WHERE)
    check_cache(v_codes, v_affine, q.shape[3], WHERE)
    if mask is not None and (mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point())):
        raise KernelError(
            f"the mask is {mask.dtype} with {mask.dim()} dimensions",
            where=WHERE,
            do="give a bool or floating-point mask of shape [batch or 1, heads or 1, queries, keys]",
        )
    if filled is not None and (filled.shape != (1,) or filled.dtype != torch.int64):
        raise KernelError(
            f"the number of keys is {filled.dtype} {tuple(filled.shape)}",
            where=WHERE,
            do="give it as int64 [1], on the device of the cache",
        )


OVERLOAD = torch.ops.qpcompile.attention_kv4.default
