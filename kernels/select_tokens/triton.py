"""GPU kernels of select_tokens: rank tokens by counting comparisons, then compact the kept ones.

No sort: the S^2 comparisons of a row are distributed over programs (17 million at 4,096 tokens), then one program per
row scans it and writes the kept tokens in order.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, OTHERS, WALK = 64, 128, 1024


@triton.jit
def rank_kernel(
    scores_ptr: tl.tensor, rank_ptr: tl.tensor, S: tl.tensor, TOKENS: tl.constexpr, OTHERS: tl.constexpr
) -> None:
    """scores: f32[B, S] -> rank: i32[B, S]: 0 is the highest score, ties by index, NaN ranks first."""
    row = tl.program_id(0).to(tl.int64) * S
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None]
    own = tl.load(scores_ptr + row + token, mask=token < S, other=0.0)
    own_nan = own != own
    rank = tl.zeros((TOKENS, 1), tl.int32)
    for start in range(0, S, OTHERS):
        other = (start + tl.arange(0, OTHERS))[None, :]
        score = tl.load(scores_ptr + row + other, mask=other < S, other=float("-inf"))
        nan = score != score
        equal = (score == own) | (nan & own_nan)
        before = (score > own) | (nan & (own == own)) | (equal & (other < token))
        rank += tl.sum((before & (other < S)).to(tl.int32), 1, keep_dims=True)
    tl.store(rank_ptr + row + token, rank, mask=token < S)


@triton.jit
def compact_kernel(
    rank_ptr: tl.tensor,
    quota_ptr: tl.tensor,
    index_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    S: tl.tensor,
    keep: tl.tensor,
    WALK: tl.constexpr,
) -> None:
    """rank: i32[B, S], quota: i64[B] -> index: i64[B, keep] ascending, valid: u8[B, keep]; one program per row."""
    batch = tl.program_id(0).to(tl.int64)
    quota = tl.load(quota_ptr + batch)
    before = tl.zeros((1,), tl.int32)
    for start in range(0, S, WALK):
        token = start + tl.arange(0, WALK)
        rank = tl.load(rank_ptr + batch * S + token, mask=token < S, other=2147483647)
        kept = (rank < keep).to(tl.int32)
        place = batch * keep + before + tl.cumsum(kept, 0) - 1
        tl.store(index_ptr + place, token.to(tl.int64), mask=kept > 0)
        tl.store(valid_ptr + place, (rank < quota).to(tl.uint8), mask=kept > 0)
        before += tl.sum(kept, 0)


def select_tokens(scores: Tensor, keep: int, quota: Tensor) -> tuple[Tensor, Tensor]:
    """scores: f32[B, S], quota: i64[B] -> index: i64[B, keep] ascending, valid: bool[B, keep]."""
    scores, quota = scores.contiguous(), quota.contiguous()
    batch, length = scores.shape
    index = torch.empty((batch, keep), dtype=torch.int64, device=scores.device)
    valid = torch.empty((batch, keep), dtype=torch.uint8, device=scores.device)
    if index.numel():
        rank = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
        rank_kernel[(batch, triton.cdiv(length, TOKENS))](scores, rank, length, TOKENS, OTHERS, num_warps=4)
        compact_kernel[(batch,)](rank, quota, index, valid, length, keep, WALK, num_warps=4)
    return index, valid.view(torch.bool)
