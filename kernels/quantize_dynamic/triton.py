"""GPU kernel of quantize_dynamic: one program reads one group of one token, and writes its codes and its scale.

Rounding half to even adds and subtracts 1.5 * 2^23, whose ulp is 1: the interpreter has no rint, and the compiler does
not reassociate float additions.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.quantize_dynamic.reference import group_count, highest

ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def quantize_tile(
    x: tl.tensor, clip_ratio: tl.tensor, HIGHEST: tl.constexpr, TOKENS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """x: f32[R, N], one token, or TOKENS = R tokens -> codes: i8[R, N] to HIGHEST, scale: f32[TOKENS, 1]."""
    peak = tl.max(tl.abs(x), 1, keep_dims=True)
    # tl.max drops NaN; a token with NaN must stay NaN, as in the reference.
    poisoned = tl.max((x != x).to(tl.int32), 1, keep_dims=True)
    if TOKENS == 1:
        peak = tl.max(peak, 0, keep_dims=True)
        poisoned = tl.max(poisoned, 0, keep_dims=True)
    scale = tl.div_rn(peak * clip_ratio, HIGHEST * 1.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(poisoned > 0, float("nan"), scale)
    code = tl.minimum(tl.maximum(tl.div_rn(x, tl.zeros_like(x) + scale), -HIGHEST - 1.0), HIGHEST * 1.0)
    return ((code + ROUNDER) - ROUNDER).to(tl.int8), scale


@triton.jit
def quantize_dynamic_kernel(
    x_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    clip_ratio: tl.tensor,
    HIGHEST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x: f[R, GROUP] -> q: i8[R, GROUP], scale: f32[R]; program r processes row r."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row * GROUP + column, mask=column < GROUP, other=0.0).to(tl.float32)
    codes, scale = quantize_tile(x, clip_ratio, HIGHEST, 1)
    tl.store(q_ptr + row * GROUP + column, codes, mask=column < GROUP)
    tl.store(scale_ptr + row + tl.arange(0, 1)[:, None], scale)


def quantize_dynamic(x: Tensor, group_size: int, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    x = x.contiguous()
    groups = group_count(x.shape[-1], group_size)
    width = x.shape[-1] // groups
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    if scale.numel():
        block = triton.next_power_of_2(width)
        warps = min(max(block // 512, 1), 16)
        quantize_dynamic_kernel[(scale.numel(),)](
            x, codes, scale, clip_ratio, highest(bits), width, block, num_warps=warps, enable_fp_fusion=False
        )
    return codes, scale
