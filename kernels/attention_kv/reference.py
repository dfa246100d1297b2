"""Attention on a cache of codes, grouped-query: y_h = softmax(scale * q_h K_g^T + mask) V_g with g = h // (Hq / Hkv).

K and V are dequantized from the codes of kv_write, of 4 or 8 bits each. Probabilities are not quantized; accumulation
is in `wide_type`.

Source: FlatQuant, attention on dequantized keys and values (arXiv 2410.09426).
"""

from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.attention_kv.masking import masked_softmax
from qpcompile.kernels.kv_read.reference import kv_read
from qpcompile.kernels.sums import wide_type


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

    mask: f or bool [B | 1, 1 | Hq, Sq, S], see masking.py; None lets every query see every key.
    filled: i64[1], the number of valid keys; None for all S.
    """
    if filled is not None:
        k_codes, k_affine, v_codes, v_affine, mask = front(k_codes, k_affine, v_codes, v_affine, mask, filled)
    heads, head_dim = q.shape[1], q.shape[3]
    repeats = heads // k_codes.shape[1]
    wide = wide_type(q)
    k = kv_read(k_codes, k_affine, head_dim, k_bits, wide).repeat_interleave(repeats, dim=1)
    v = kv_read(v_codes, v_affine, head_dim, v_bits, wide).repeat_interleave(repeats, dim=1)
    probabilities = masked_softmax(q.to(wide) @ k.mT * scale, mask)
    return tokens_outside(probabilities @ v).to(q.dtype)


def tokens_outside(y: Tensor) -> Tensor:
    """y: f[B, H, S, D] -> the same, stored as [B, S, H, D], like torch's own attention: graphs rely on that layout."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def front(
    k_codes: Tensor, k_affine: Tensor, v_codes: Tensor, v_affine: Tensor, mask: Tensor | None, filled: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The first `filled: i64[1]` keys and values, and their part of the mask.

    Raises KernelError if there are fewer.
    """
    count, room = int(filled), k_codes.shape[2]
    if not 0 <= count <= room:
        raise KernelError(
            f"filled is {count}, but there is room for {room} keys",
            where="qpcompile::attention_kv, operand filled",
            do="give the number of keys that the cache holds",
        )
    k_codes, k_affine, v_codes, v_affine = (part[:, :, :count] for part in (k_codes, k_affine, v_codes, v_affine))
    return k_codes, k_affine, v_codes, v_affine, mask if mask is None else mask[..., :count]
