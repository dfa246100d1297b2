"""GPU kernels of attention_kv: two paths, chosen by the number of query rows that share a key.

Few rows (decode): split-K attention. The keys of a head are split over programs, so that one token occupies the GPU;
each reads its codes once for all rows of its group and writes a maximum, a sum of exponentials and a weighted sum of
values, which a second kernel reduces. The split depends only on the number of keys, whether that is a size or read from
the device, so the results are bit-identical. The codes enter the products as integers, scale and zero point are applied
to the small operand (see cpu.py).
Many rows (prefill): keys and values are dequantized to the type of the queries, then torch's own attention runs.

Products are in TF32, which represents codes and half-precision types exactly; float32 queries and weights are split
into two TF32 parts. Weights of half-precision types are truncated to 10 bits before both the code and the zero-point
products.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.attention_kv.masking import FORBIDDEN, split_mask
from qpcompile.kernels.attention_kv.reference import front, tokens_outside
from qpcompile.kernels.hadamard.triton import tf32_parts
from qpcompile.kernels.kv_read.triton import kv_read

FEW_ROWS = 64
KEYS = 64
# Two per multiprocessor of an H100 or H200.
PROGRAMS = 264
MOST_SPLITS = 64
LEAST = tl.constexpr(FORBIDDEN)


@triton.jit
def exact_product(x: tl.tensor, codes: tl.tensor, y: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """y + x: f32[R, K] times codes: f32[K, N], integers; EXACT: x does not fit in TF32."""
    if EXACT:
        x, low = tf32_parts(x)
        y = tl.dot(low, codes, y, input_precision="tf32")
    return tl.dot(x, codes, y, input_precision="tf32")


@triton.jit
def decode_kernel(
    q_ptr: tl.tensor,
    k_codes_ptr: tl.tensor,
    k_affine_ptr: tl.tensor,
    v_codes_ptr: tl.tensor,
    v_affine_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    filled_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    scale: tl.tensor,
    Q: tl.tensor,
    S: tl.tensor,
    G: tl.tensor,
    most_splits: tl.tensor,
    mask_batch: tl.tensor,
    mask_head: tl.tensor,
    mask_query: tl.tensor,
    mask_key: tl.tensor,
    D: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    FILLED: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """q: f[B, G, SHARE, Q, D], codes: u8[B, G, S, ceil(D bits / 8)], affine: f32[B, G, S, 2], of keys and values.

    FILLED: only the first filled: i64[1] of the S keys are valid. Program (group, split) processes its share of them,
    in whole blocks, and writes sums: f32[B G, splits, ROWS, 8 / V_BITS, V_PAD] of weighted values, and ends: f32[B G,
    splits, ROWS, 2], the largest score and the sum of exponentials; a program without keys writes neutral values.
    MASK: "none", "bool" or "float".
    """
    K_WIDTH: tl.constexpr = (D * K_BITS + 7) // 8
    V_WIDTH: tl.constexpr = (D * V_BITS + 7) // 8
    keys = S
    if FILLED:
        # Checking the count would take a copy to the host.
        keys = tl.maximum(tl.minimum(tl.load(filled_ptr), S), 0).to(tl.int32)
    blocks = tl.cdiv(keys, KEYS)
    split_size = tl.cdiv(blocks, tl.maximum(tl.minimum(blocks, most_splits), 1)) * KEYS
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, ROWS)
    k_byte, v_byte = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    row_in = row < SHARE * Q
    q_row = q_ptr + (group * SHARE * Q + row)[:, None] * D + k_byte[None, :]
    q_low = tl.load(q_row, mask=row_in[:, None] & (k_byte < K_WIDTH)[None, :], other=0.0).to(tl.float32)
    if K_BITS == 4:
        high_in = row_in[:, None] & (k_byte + K_WIDTH < D)[None, :]
        q_high = tl.load(q_row + K_WIDTH, mask=high_in, other=0.0).to(tl.float32)
        q_sum = tl.sum(q_low + q_high, 1)
    else:
        q_sum = tl.sum(q_low, 1)
    mask_row = (group // G) * mask_batch + ((group % G) * SHARE + row // Q) * mask_head + row % Q * mask_query
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y_low = tl.zeros((ROWS, V_PAD), tl.float32)
    y_high = tl.zeros((ROWS, V_PAD), tl.float32)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, keys), KEYS):
        key = start + tl.arange(0, KEYS)
        key_in = key < keys
        at = group * S + key
        here = key_in[None, :] & (k_byte < K_WIDTH)[:, None]
        codes = tl.load(k_codes_ptr + at[None, :] * K_WIDTH + k_byte[:, None], mask=here, other=0).to(tl.int32)
        k_scale = tl.load(k_affine_ptr + at * 2, mask=key_in, other=0.0)
        k_zero = tl.load(k_affine_ptr + at * 2 + 1, mask=key_in, other=0.0)
        scores = tl.zeros((ROWS, KEYS), tl.float32)
        if K_BITS == 4:
            scores = exact_product(q_low, (codes & 15).to(tl.float32), scores, EXACT)
            scores = exact_product(q_high, (codes >> 4).to(tl.float32), scores, EXACT)
        else:
            scores = exact_product(q_low, codes.to(tl.float32), scores, EXACT)
        scores = (scores - q_sum[:, None] * k_zero[None, :]) * (k_scale * scale)[None, :]
        allowed = row_in[:, None] & key_in[None, :]
        if MASK != "none":
            mask_at = mask_ptr + mask_row[:, None] + key.to(tl.int64)[None, :] * mask_key
            if MASK == "bool":
                allowed = allowed & (tl.load(mask_at, mask=allowed, other=0) != 0)
            else:
                bias = tl.load(mask_at, mask=allowed, other=float("-inf")).to(tl.float32)
                allowed = allowed & (bias > LEAST)
                scores += tl.where(allowed, bias, 0.0)
        scores = tl.where(allowed, scores, float("-inf"))
        above = tl.maximum(peak, tl.max(scores, 1))
        # A row without a visible key so far is shifted by 0: exp(-inf) is 0.
        shift = tl.where(above == float("-inf"), 0.0, above)
        parts = tl.exp(scores - shift[:, None])
        fade = tl.exp(peak - shift)
        total = total * fade + tl.sum(parts, 1)
        v_scale = tl.load(v_affine_ptr + at * 2, mask=key_in, other=0.0)
        v_zero = tl.load(v_affine_ptr + at * 2 + 1, mask=key_in, other=0.0)
        weights = parts * v_scale[None, :]
        if not EXACT:
            weights, _ = tf32_parts(weights)
        offset = tl.sum(weights * v_zero[None, :], 1)[:, None]
        here = key_in[:, None] & (v_byte < V_WIDTH)[None, :]
        codes = tl.load(v_codes_ptr + at[:, None] * V_WIDTH + v_byte[None, :], mask=here, other=0).to(tl.int32)
        y_low = y_low * fade[:, None] - offset
        if V_BITS == 4:
            y_low = exact_product(weights, (codes & 15).to(tl.float32), y_low, EXACT)
            y_high = exact_product(weights, (codes >> 4).to(tl.float32), y_high * fade[:, None] - offset, EXACT)
        else:
            y_low = exact_product(weights, codes.to(tl.float32), y_low, EXACT)
        peak = above
    place = (group * tl.num_programs(1) + split) * ROWS + row
    tl.store(ends_ptr + place * 2, peak, mask=row_in)
    tl.store(ends_ptr + place * 2 + 1, total, mask=row_in)
    sums_row = sums_ptr + place[:, None] * (8 // V_BITS * V_PAD) + v_byte[None, :]
    tl.store(sums_row, y_low, mask=row_in[:, None])
    if V_BITS == 4:
        tl.store(sums_row + V_PAD, y_high, mask=row_in[:, None])


@triton.jit
def joined_tile(
    sums_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    token: tl.tensor,
    channel: tl.tensor,
    here: tl.tensor,
    Q: tl.tensor,
    G: tl.tensor,
    splits: tl.tensor,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PAD: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """The output of decode_kernel -> f32[R, N], these channels of the heads of these tokens, side by side.

    token: i64[R, 1], channel: i32[1 | R, N], here: bool[R, N]. For a row operator (transform_quantize/triton.py).
    """
    WIDTH: tl.constexpr = (D * BITS + 7) // 8
    head, place = channel // D, channel % D
    group = token // Q * G + head // SHARE
    first = group * splits * ROWS + head % SHARE * Q + token % Q
    # Values of 4 bits are in two planes.
    byte = tl.where(place < WIDTH, place, PAD + place - WIDTH)
    top = tl.full(here.shape, float("-inf"), tl.float32)
    for split in range(splits):
        peak = tl.load(ends_ptr + (first + split * ROWS) * 2, mask=here, other=float("-inf"))
        top = tl.maximum(top, peak)
    shift = tl.where(top == float("-inf"), 0.0, top)
    whole = tl.zeros(here.shape, tl.float32)
    y = tl.zeros(here.shape, tl.float32)
    for split in range(splits):
        at = first + split * ROWS
        share = tl.exp(tl.load(ends_ptr + at * 2, mask=here, other=float("-inf")) - shift)
        whole += tl.load(ends_ptr + at * 2 + 1, mask=here, other=0.0) * share
        y += tl.load(sums_ptr + at * (8 // BITS * PAD) + byte, mask=here, other=0.0) * share
    # A NaN sum is not an empty sum.
    return y / tl.where(top == float("-inf"), 1.0, whole)


@triton.jit
def join_kernel(
    sums_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    y_ptr: tl.tensor,
    Q: tl.tensor,
    G: tl.tensor,
    splits: tl.tensor,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PAD: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """The output of decode_kernel -> y: f[B, Q, G SHARE, D]; program (group, row). A fully masked row is 0.

    BITS: of the codes of values.
    """
    WIDTH: tl.constexpr = (D * BITS + 7) // 8
    group, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    place = (group * splits + split) * ROWS + row
    peak = tl.load(ends_ptr + place * 2, mask=split < splits, other=float("-inf"))
    total = tl.load(ends_ptr + place * 2 + 1, mask=split < splits, other=0.0)
    top = tl.max(peak, 0)
    share = tl.exp(peak - tl.where(top == float("-inf"), 0.0, top))
    whole = tl.sum(total * share, 0)
    byte = tl.arange(0, PAD)
    y_at = y_ptr + ((group // G * Q + row % Q) * G * SHARE + group % G * SHARE + row // Q) * D + byte
    sums = sums_ptr + place[:, None] * (8 // BITS * PAD) + byte[None, :]
    # A NaN sum is not an empty sum.
    whole = tl.where(top == float("-inf"), 1.0, whole)
    low = tl.sum(tl.load(sums, mask=(split < splits)[:, None], other=0.0) * share[:, None], 0)
    tl.store(y_at, (low / whole).to(y_ptr.dtype.element_ty), mask=byte < WIDTH)
    if BITS == 4:
        high = tl.sum(tl.load(sums + PAD, mask=(split < splits)[:, None], other=0.0) * share[:, None], 0)
        tl.store(y_at + WIDTH, (high / whole).to(y_ptr.dtype.element_ty), mask=byte + WIDTH < D)


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
    """Shapes as in reference.py. With few rows the count `filled` stays on the device."""
    if few_rows(q, k_codes):
        return _decode(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits, filled)
    if filled is not None:
        k_codes, k_affine, v_codes, v_affine, mask = front(k_codes, k_affine, v_codes, v_affine, mask, filled)
    return _prefill(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits)


def few_rows(q: Tensor, k_codes: Tensor) -> bool:
    """Whether split-K attention serves these queries."""
    return q.shape[2] * (q.shape[1] // k_codes.shape[1]) <= FEW_ROWS and q.dtype != torch.float64


def _prefill(
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
    k = kv_read(k_codes, k_affine, q.shape[3], k_bits, q.dtype)
    v = kv_read(v_codes, v_affine, q.shape[3], v_bits, q.dtype)
    if mask is None:
        return tokens_outside(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True))
    allowed, bias = split_mask(mask)
    term = allowed if bias is None else bias.to(q.dtype).masked_fill_(~allowed, -torch.inf)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=term, scale=scale, enable_gqa=True)
    # torch's result for a fully masked row differs between versions.
    return tokens_outside(y.masked_fill_(~allowed.any(-1, keepdim=True), 0.0))


@dataclass(frozen=True, eq=False)
class Partial:
    """What decode_kernel writes for queries f[batch, groups share, queries, D]; see there.

    bits: of the codes of values. most: the largest number of splits for these sizes, on which a kernel is compiled.
    """

    sums: Tensor
    ends: Tensor
    batch: int
    groups: int
    share: int
    queries: int
    head_dim: int
    bits: int
    most: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Numbers of splits and of rows, planes of values and their width."""
        splits, rows, planes, pad = self.sums.shape[1:]
        return splits, rows, planes, pad


def _decode(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
    filled: Tensor | None,
) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    y = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    if not y.numel():
        return y.transpose(1, 2)
    partial = partial_sums(q, k_codes, k_affine, v_codes, v_affine, mask, scale, k_bits, v_bits, filled)
    if partial is None:
        return y.zero_().transpose(1, 2)
    splits, rows, _, pad = partial.sizes
    join_kernel[(batch * partial.groups, partial.share * queries)](
        partial.sums, partial.ends, y, queries, partial.groups, splits, head_dim, v_bits, pad, partial.share, rows,
        triton.next_power_of_2(partial.most), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y.transpose(1, 2)


def partial_sums(
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
) -> Partial | None:
    """Attention of few query rows on each split of the keys; None without keys. Shapes as in reference.py."""
    batch, heads, queries, head_dim = q.shape
    groups, length = k_codes.shape[1:3]
    share = heads // groups
    k_pad, v_pad = (max(triton.next_power_of_2(codes.shape[3]), 16) for codes in (k_codes, v_codes))
    rows = max(triton.next_power_of_2(share * queries), 16)
    most = min(triton.cdiv(PROGRAMS, max(batch * groups, 1)), MOST_SPLITS)
    splits = min(triton.cdiv(length, KEYS), most)
    if not splits:
        return None
    sums = torch.empty((batch * groups, splits, rows, 8 // v_bits, v_pad), dtype=torch.float32, device=q.device)
    ends = torch.empty((batch * groups, splits, rows, 2), dtype=torch.float32, device=q.device)
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    whole = q if mask is None else mask.expand(batch, heads, queries, length)
    seen = whole.view(torch.uint8) if kind == "bool" else whole
    stored = [each.contiguous() for each in (k_codes, k_affine, v_codes, v_affine)]
    decode_kernel[(batch * groups, splits)](
        q.contiguous(), *stored, seen, sums if filled is None else filled, sums, ends, scale, queries, length, groups,
        most, *whole.stride(), head_dim, k_bits, v_bits, k_pad, v_pad, share, rows, KEYS, kind, filled is not None,
        q.dtype == torch.float32,
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    return Partial(sums, ends, batch, groups, share, queries, head_dim, v_bits, most)
