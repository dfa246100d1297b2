"""CPU attention on a cache of codes: two paths, chosen by the number of query rows that share a key.

Many rows (prefill): K and V are unpacked once. In bfloat16 with AMX tiles they are rounded to it (kernels/attention);
elsewhere C multiplies blocks of rows, and skips what the mask hides (prompt.inc).
Few rows (decode): the codes are unpacked as they are read.
In both, scale and zero point are applied to the small operand:

    q . k_s     = scale_s * (q . code_s - zero_s * sum(q))
    sum_s p_s v_s = sum_s (p_s * scale_s) code_s - sum_s p_s * scale_s * zero_s

Without the library torch computes both; with one row that is 1.3 to 1.8 times faster on codes, for 640 tokens and more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.attention.cpu import attention, on_tiles
from qpcompile.kernels.attention_kv.masking import masked_softmax, split_mask
from qpcompile.kernels.attention_kv.reference import front, tokens_outside
from qpcompile.kernels.attention_kv.rule import RULE
from qpcompile.kernels.kv_read.cpu import kv_read
from qpcompile.kernels.native import library as native
from qpcompile.kernels.sums import wide_type

FEW_ROWS = 8


@RULE.checked
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
    """Shapes as in reference.py."""
    if filled is not None:
        k_codes, k_affine, v_codes, v_affine, mask = front(k_codes, k_affine, v_codes, v_affine, mask, filled)
    rows_per_key = q.shape[2] * (q.shape[1] // k_codes.shape[1])
    tiles = rows_per_key > FEW_ROWS and on_tiles(q, k_codes.shape[2], mask, scale)
    if not tiles and native.computes(q, mask, k_affine, v_affine):
        return _native(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits)
    attend = _attend_to_codes if rows_per_key <= FEW_ROWS else _attend_to_values
    return tokens_outside(attend(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits)).to(q.dtype)


def _native(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    level: int | None = None,
) -> Tensor:
    batch, heads, rows, head_dim = q.shape
    groups, keys = k_codes.shape[1:3]
    q = q if q.stride(3) == 1 else q.contiguous()
    cache = k_codes, k_affine, v_codes, v_affine
    if any(part.dim() != 4 or part.shape[:3] != (batch, groups, keys) for part in cache):
        raise KernelError(
            f"codes and scales of keys and values {[list(part.shape) for part in cache]} are not of one cache",
            where="qpcompile::attention_kv",
            do="pass what qpcompile::kv_write returned for the same keys and values",
        )
    room = _room(cache[0])
    if room < keys or any(_room(part) != room for part in cache):
        cache, room = tuple(part.contiguous() for part in cache), keys
    seen = None if mask is None else mask.expand(batch, heads, rows, keys)
    y = torch.empty((batch, rows, heads, head_dim), dtype=q.dtype)
    sizes = batch, heads, groups, rows, keys, room, head_dim, k_bits, v_bits
    native.call("attention_kv_" + native.real(q), q, *cache, seen, y, *sizes, scale, level=level)
    return y.transpose(1, 2)


def _room(part: Tensor) -> int:
    """Stride between heads, in keys, of a cache part [B, H, S, W]; 0 if it is not the front of a contiguous one."""
    _, heads, _, width = part.shape
    of_batch, of_head, of_key, of_number = part.stride()
    packed = width > 0 and of_number == 1 and of_key == width and of_head % width == 0 and of_batch == heads * of_head
    return of_head // width if packed else 0


def _attend_to_values(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
) -> Tensor:
    head_dim = q.shape[-1]
    if on_tiles(q, k_codes.shape[2], mask, scale):
        k = kv_read(k_codes, k_affine, head_dim, k_bits, q.dtype)
        return attention(q, k, kv_read(v_codes, v_affine, head_dim, v_bits, q.dtype), mask, scale)
    wide = wide_type(q)
    k = kv_read(k_codes, k_affine, head_dim, k_bits, wide)
    v = kv_read(v_codes, v_affine, head_dim, v_bits, wide)
    if mask is None:
        return F.scaled_dot_product_attention(q.to(wide), k, v, scale=scale, enable_gqa=True)
    allowed, bias = split_mask(mask)
    term = allowed if bias is None else bias.to(wide).masked_fill_(~allowed, -torch.inf)
    y = F.scaled_dot_product_attention(q.to(wide), k, v, attn_mask=term, scale=scale, enable_gqa=True)
    # torch's result for a fully masked row differs between versions.
    return y.masked_fill_(~allowed.any(-1, keepdim=True), 0.0)


def _attend_to_codes(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
) -> Tensor:
    batch, heads, rows, head_dim = q.shape
    groups, length = k_codes.shape[1:3]
    wide = wide_type(q)
    shared = heads // groups * rows
    grouped = (q.to(wide) * scale).reshape(batch * groups, shared, head_dim)
    k_scale, k_zero, v_scale, v_zero = (
        part.to(wide).reshape(batch * groups, 1, length)
        for affine in (k_affine, v_affine)
        for part in affine.unbind(-1)
    )
    keys, values = (
        [part.to(wide) for part in _planes(codes.flatten(0, 1), head_dim, bits)]
        for codes, bits in ((k_codes, k_bits), (v_codes, v_bits))
    )
    products = torch.bmm(grouped[..., : keys[0].shape[-1]], keys[0].mT)
    for high in keys[1:]:
        products.baddbmm_(grouped[..., -high.shape[-1] :], high.mT)
    scores = products.sub_(grouped.sum(-1, keepdim=True) * k_zero).mul_(k_scale)
    probabilities = masked_softmax(scores.reshape(batch, heads, rows, length), mask)
    weights = probabilities.reshape(batch * groups, shared, length) * v_scale
    y = torch.cat([torch.bmm(weights, part) for part in values], dim=-1)
    return y.sub_((weights * v_zero).sum(-1, keepdim=True)).reshape(batch, heads, rows, head_dim)


def _planes(codes: Tensor, head_dim: int, bits: int) -> tuple[Tensor, ...]:
    """codes: u8[..., P] -> themselves; of 4 bits the low ones u8[..., P] and the high ones u8[..., D - P], if any."""
    high = head_dim - codes.shape[-1]
    if bits == 8:
        return (codes,)
    return (codes & 15, (codes >> 4)[..., :high]) if high else (codes & 15,)
