"""GPU kernels of token_scores' attention: the mass that keys receive from groups of queries, without an [S, S] matrix.

    lse[r] = log sum_s exp(score[r, s])          for rows in any group, keys in blocks
    mass[m, s] = sum_{r in group m} exp(score[r, s] - lse[r])

Blocks of rows in no group only read their flags, so the cost is proportional to the number of text queries. The rows
are selected on the GPU: nothing is copied back, and a CUDA graph can be captured. Products are in TF32, which
represents half-precision types exactly; float32 takes three of them.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.attention_kv.masking import FORBIDDEN

ROWS, KEYS = 32, 64
LEAST = tl.constexpr(FORBIDDEN)


@triton.jit
def load_heads(
    x_ptr: tl.tensor, head: tl.tensor, token: tl.tensor, S: tl.tensor, D: tl.constexpr, PAD: tl.constexpr
) -> tl.tensor:
    """x: f[heads, S, D] -> f32[tokens, PAD] of one head, 0 outside."""
    channel = tl.arange(0, PAD)[None, :]
    at = x_ptr + (head * S + token[:, None]) * D + channel
    return tl.load(at, mask=(token < S)[:, None] & (channel < D), other=0.0).to(tl.float32)


@triton.jit
def masked_products(
    q: tl.tensor,
    k: tl.tensor,
    row: tl.tensor,
    key: tl.tensor,
    scale: tl.tensor,
    mask_ptr: tl.tensor,
    mask_query: tl.tensor,
    mask_key: tl.tensor,
    S: tl.tensor,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """q: f32[R, PAD], k: f32[N, PAD], mask of one head -> scores: f32[R, N], -inf where masked or out of bounds.

    MASK: "bool", "float", or "causal", where mask is u8[S], the valid keys.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    allowed = (row < S)[:, None] & (key < S)[None, :]
    if MASK == "causal":
        counts = tl.load(mask_ptr + key, mask=key < S, other=0) != 0
        allowed = allowed & (key[None, :] <= row[:, None]) & counts[None, :]
    else:
        at = mask_ptr + row.to(tl.int64)[:, None] * mask_query + key.to(tl.int64)[None, :] * mask_key
        if MASK == "bool":
            allowed = allowed & (tl.load(at, mask=allowed, other=0) != 0)
        else:
            bias = tl.load(at, mask=allowed, other=float("-inf")).to(tl.float32)
            allowed = allowed & (bias > LEAST)
            scores += tl.where(allowed, bias, 0.0)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def row_sums_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    H: tl.tensor,
    S: tl.tensor,
    mask_batch: tl.tensor,
    mask_head: tl.tensor,
    mask_query: tl.tensor,
    mask_key: tl.tensor,
    D: tl.constexpr,
    PAD: tl.constexpr,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """q: f[B H, S, D], k: f[B H / SHARE, S, D], groups: u8[B, GROUPS, S] -> lse: f32[B H, S]; program (head, rows)."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    named = tl.zeros((ROWS,), tl.int32)
    for group in tl.static_range(GROUPS):
        at = groups_ptr + (head // H * GROUPS + group) * S + row
        named = named | tl.load(at, mask=row < S, other=0).to(tl.int32)
    if tl.max(named, 0) > 0:
        mask_of = mask_ptr + head // H * mask_batch + head % H * mask_head
        q = load_heads(q_ptr, head, row, S, D, PAD)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        end = tl.minimum(S, (tl.program_id(1) + 1) * ROWS) if MASK == "causal" else S
        for start in range(0, end, KEYS):
            key = start + tl.arange(0, KEYS)
            k = load_heads(k_ptr, head // SHARE, key, S, D, PAD)
            scores = masked_products(q, k, row, key, scale, mask_of, mask_query, mask_key, S, MASK, PRECISION)
            above = tl.maximum(peak, tl.max(scores, 1))
            shift = tl.where(above == float("-inf"), 0.0, above)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
            peak = above
        # A fully masked row: exp(-inf - 0) stays 0.
        lse = tl.where(total == 0.0, 0.0, peak + tl.log(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse_ptr + head * S + row, lse, mask=row < S)


@triton.jit
def column_sums_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    scale: tl.tensor,
    H: tl.tensor,
    S: tl.tensor,
    mask_batch: tl.tensor,
    mask_head: tl.tensor,
    mask_query: tl.tensor,
    mask_key: tl.tensor,
    D: tl.constexpr,
    PAD: tl.constexpr,
    SHARE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """As row_sums_kernel, with its lse -> mass: f32[2, B H, GROUPS, S]: probabilities, and queries that see the key."""
    head = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    mask_of = mask_ptr + head // H * mask_batch + head % H * mask_head
    k = load_heads(k_ptr, head // SHARE, key, S, D, PAD)
    for group in tl.static_range(GROUPS):
        mass = tl.zeros((KEYS,), tl.float32)
        seen = tl.zeros((KEYS,), tl.float32)
        # Rows before the first key of the block see none of it.
        first = tl.program_id(1) * KEYS // ROWS * ROWS if MASK == "causal" else 0
        for start in range(first, S, ROWS):
            row = start + tl.arange(0, ROWS)
            at = groups_ptr + (head // H * GROUPS + group) * S + row
            named = tl.load(at, mask=row < S, other=0).to(tl.int32)
            if tl.max(named, 0) > 0:
                q = load_heads(q_ptr, head, row, S, D, PAD)
                scores = masked_products(q, k, row, key, scale, mask_of, mask_query, mask_key, S, MASK, PRECISION)
                scores = tl.where((named > 0)[:, None], scores, float("-inf"))
                lse = tl.load(lse_ptr + head * S + row, mask=(row < S) & (named > 0), other=0.0)
                mass += tl.sum(tl.exp(scores - lse[:, None]), 0)
                seen += tl.sum((scores != float("-inf")).to(tl.float32), 0)
        mass_at = mass_ptr + (head * GROUPS + group) * S + key
        tl.store(mass_at, mass, mask=key < S)
        tl.store(mass_at + tl.num_programs(0).to(tl.int64) * GROUPS * S, seen, mask=key < S)


def attention_mass(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, valid: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes as in reference.py."""
    batch, heads, length, head_dim = q.shape
    count = groups.shape[1]
    mass = torch.empty((2, batch, heads, count, length), dtype=torch.float32, device=q.device)
    if mass.numel():
        q, k, groups = q.contiguous(), k.contiguous(), groups.contiguous().view(torch.uint8)
        kind = "causal" if mask is None else "bool" if mask.dtype == torch.bool else "float"
        seen = valid.contiguous()[:, None, None] if mask is None else mask
        seen = seen.expand(batch, heads, length, length)
        strides = seen.stride()
        seen = seen if kind == "float" else seen.view(torch.uint8)
        lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
        sizes = (scale, heads, length, *strides, head_dim, max(triton.next_power_of_2(head_dim), 16))
        options = (heads // k.shape[1], count, ROWS, KEYS, kind, "tf32x3" if q.dtype == torch.float32 else "tf32")
        # Three TF32 products need twice the registers.
        warps = 8 if q.dtype == torch.float32 else 4
        row_sums_kernel[(batch * heads, triton.cdiv(length, ROWS))](
            q, k, seen, groups, lse, *sizes, *options, num_warps=warps, num_stages=2
        )
        column_sums_kernel[(batch * heads, triton.cdiv(length, KEYS))](
            q, k, seen, groups, lse, mass, *sizes, *options, num_warps=warps, num_stages=2
        )
    probabilities, seen_by = mass.mean(2)
    return probabilities, seen_by
