"""GPU kernel of linear_w8a16: half-precision products on 8-bit weights that are dequantized in registers.

As in linear_w4a16/triton.py the product is transposed, with the weight as left operand, and a code becomes a float
without a conversion: it is inserted into the low bits of a number whose ulp is 1, and that number is subtracted.

    float16:   1024 + (q + 128)   -> that - 1152                                = q
    bfloat16:  128 + q mod 128, and 128 where q >= 0, else 256 -> their difference = q

All of these are exact. Heads have so many outputs that split-K is not needed.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.linear_int.tuning import Tile

SHAPES = {
    16: Tile(out=64, tokens=16, step=64, warps=4, stages=4),
    64: Tile(out=64, tokens=64, step=64, warps=4, stages=4),
    2048: Tile(out=128, tokens=128, step=64, warps=8, stages=4),
}
"""Tiles by maximum token count; the last one serves more. `step` counts columns. Chosen by inspecting machine code, not
by benchmarks.
"""


@triton.jit
def floats_of(codes: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """codes: i8[...] -> the same values as dtype[...]."""
    wide = codes.to(tl.uint8, bitcast=True).to(tl.int16)
    if dtype == tl.float16:
        values = ((wide ^ 0x80) | 0x6400).to(dtype, bitcast=True) - 1152.0
    else:
        values = ((wide & 0x7F) | 0x4300).to(dtype, bitcast=True) - ((wide & 0x80) | 0x4300).to(dtype, bitcast=True)
    return values


@triton.jit
def linear_w8a16_kernel(
    w_ptr: tl.tensor,
    x_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """w: i8[N, K], x: f16 or bf16[T, K], w_scale: f32[N], bias: f[N] -> y: f[T, N]. Grid: (tiles,); STEP divides K."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0)
    tiles_out = tl.cdiv(N, OUT)
    row = tile % tiles_out * OUT + tl.arange(0, OUT)
    token = tile // tiles_out * TOKENS + tl.arange(0, TOKENS)
    row_in = row < N
    token_in = token < T
    column = tl.arange(0, STEP)
    w_at = w_ptr + tl.minimum(row, N - 1).to(tl.int64)[:, None] * K + column[None, :]
    x_at = x_ptr + token.to(tl.int64)[None, :] * K + column[:, None]
    total = tl.zeros((OUT, TOKENS), tl.float32)
    for step in range(0, K, STEP):
        x = tl.load(x_at + step, mask=token_in[None, :], other=0.0)
        total = tl.dot(floats_of(tl.load(w_at + step), HALF), x, total, out_dtype=tl.float32)
    total *= tl.load(w_scale_ptr + row, mask=row_in, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
    at = token.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(y_ptr + at, total.to(HALF), mask=row_in[:, None] & token_in[None, :])


def takes(x: Tensor) -> bool:
    """Whether the kernel supports x: f[..., K]."""
    return x.shape[-1] % SHAPES[16].step == 0 and x.dtype in (torch.float16, torch.bfloat16)


def linear_w8a16(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """x: f[..., K], weight: i8[N, K], weight_scale: f32[N, 1], bias: f[N] -> x.dtype[..., N]; see `takes`."""
    in_features, out_features = x.shape[-1], weight.shape[0]
    rows = x.reshape(-1, in_features).contiguous()
    tokens = rows.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if y.numel():
        tile = SHAPES[next((limit for limit in SHAPES if tokens <= limit), max(SHAPES))] if tile is None else tile
        tiles = triton.cdiv(out_features, tile.out) * triton.cdiv(tokens, tile.tokens)
        codes = weight.contiguous()
        linear_w8a16_kernel[(tiles,)](
            codes, rows, weight_scale.contiguous(), codes if bias is None else bias.contiguous(), y,
            tokens, out_features, in_features, bias is not None, tile.out, tile.tokens, tile.step,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], out_features)
