"""GPU kernel of linear_w4a16: half-precision products on 4-bit weights that are dequantized in registers.

As in linear_int/triton.py the product is transposed, with the weight as left operand. A nibble becomes a float without
a conversion: it is inserted into the low bits of a number whose ulp is 1 (1024 in float16, 128 in bfloat16), and that
number is subtracted. The high nibble h = q + 8 is scaled by 16; bfloat16 has too few bits for it and handles the sign
bit separately:

    float16:   1024 + 16 h   -> (1024 + 16 h) / 16 - 72               = q
    bfloat16:  128 + 16 (q mod 8), and 128 where q < 0, else 256 -> their sum / 16 - 24 = q

All of these are exact. Accumulation is in float32; programs that split the columns of a tile (split-K) write partial
sums, and the last one to arrive adds them in a fixed order: the same bits on every run.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.linear_int.tuning import Tile, with_split

PLANE = 128
"""The only plane width that the kernel supports; see linear_int/packing.py."""
SHAPES = {
    16: Tile(out=64, tokens=16, step=64, warps=4, stages=4),
    32: Tile(out=64, tokens=32, step=64, warps=4, stages=4),
    64: Tile(out=64, tokens=64, step=64, warps=4, stages=4),
    256: Tile(out=128, tokens=64, step=64, warps=8, stages=4),
    2048: Tile(out=128, tokens=128, step=64, warps=8, stages=4),
}
"""Tiles by maximum token count; the last one serves more. Chosen by inspecting machine code, not by benchmarks."""


@triton.jit
def low_nibbles(packed: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """packed: i8[...] -> the codes of the low nibbles as dtype[...]."""
    wide = packed.to(tl.uint8, bitcast=True).to(tl.int16)
    if dtype == tl.float16:
        codes = ((wide & 15) | 0x6400).to(dtype, bitcast=True) - 1032.0
    else:
        codes = ((wide & 15) | 0x4300).to(dtype, bitcast=True) - 136.0
    return codes


@triton.jit
def high_nibbles(packed: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """packed: i8[...] -> the codes of the high nibbles as dtype[...]."""
    wide = packed.to(tl.uint8, bitcast=True).to(tl.int16)
    sixteenth = tl.full((1, 1), 0.0625, dtype)
    if dtype == tl.float16:
        # Flipping the sign bit turns q into h = q + 8.
        codes = tl.fma(((wide & 0xF0) ^ 0x6480).to(dtype, bitcast=True), sixteenth, tl.full((1, 1), -72.0, dtype))
    else:
        sign = tl.fma(((wide & 0x80) ^ 0x4380).to(dtype, bitcast=True), sixteenth, tl.full((1, 1), -24.0, dtype))
        codes = tl.fma(((wide & 0x70) | 0x4300).to(dtype, bitcast=True), sixteenth, sign)
    return codes


@triton.jit
def linear_w4a16_kernel(
    w_ptr: tl.tensor,
    x_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    GW: tl.constexpr,
    PLANE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """w: i8[N, K/2], x: f16 or bf16[T, K], w_scale: f32[N, GW], bias: f[N] -> y: f[T, N].

    partial: f32[SPLIT, T, N] and arrived: i32[tiles], zeros, are used if SPLIT > 1. Grid: (tiles, SPLIT).
    2 PLANE divides K, STEP divides PLANE, and PLANE divides K / GW where GW > 1.
    """
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    STEPS: tl.constexpr = PLANE // STEP
    ALL_STEPS: tl.constexpr = K // (2 * STEP)
    SHARE: tl.constexpr = (ALL_STEPS + SPLIT - 1) // SPLIT
    SIZE: tl.constexpr = K // GW
    tile = tl.program_id(0)
    tiles_out = tl.cdiv(N, OUT)
    row = tile % tiles_out * OUT + tl.arange(0, OUT)
    token = tile // tiles_out * TOKENS + tl.arange(0, TOKENS)
    row_in = row < N
    token_in = token < T
    last_row = tl.minimum(row, N - 1).to(tl.int64)
    w_row = w_ptr + last_row[:, None] * (K // 2)
    x_row = x_ptr + token.to(tl.int64)[None, :] * K
    total = tl.zeros((OUT, TOKENS), tl.float32)
    begin = tl.program_id(1) * SHARE
    for step in range(begin, tl.minimum(begin + SHARE, ALL_STEPS)):
        block = step // STEPS
        offset = step % STEPS * STEP
        packed = tl.load(w_row + (block * PLANE + offset + tl.arange(0, STEP))[None, :])
        column = block * 2 * PLANE + offset
        if GW == 1:
            both = tl.arange(0, 2 * STEP)
            at = column + both // STEP * PLANE + both % STEP
            x = tl.load(x_row + at[:, None], mask=token_in[None, :], other=0.0)
            w = tl.join(low_nibbles(packed, HALF), high_nibbles(packed, HALF))
            total = tl.dot(w.permute((0, 2, 1)).reshape((OUT, 2 * STEP)), x, total, out_dtype=tl.float32)
        else:
            # A plane lies within one group: its partial sum is scaled before it is added.
            at = column + tl.arange(0, STEP)
            x_low = tl.load(x_row + at[:, None], mask=token_in[None, :], other=0.0)
            x_high = tl.load(x_row + (at + PLANE)[:, None], mask=token_in[None, :], other=0.0)
            low_scale = tl.load(w_scale_ptr + last_row * GW + column // SIZE)
            high_scale = tl.load(w_scale_ptr + last_row * GW + (column + PLANE) // SIZE)
            total += tl.dot(low_nibbles(packed, HALF), x_low, out_dtype=tl.float32) * low_scale[:, None]
            total += tl.dot(high_nibbles(packed, HALF), x_high, out_dtype=tl.float32) * high_scale[:, None]

    inside = row_in[:, None] & token_in[None, :]
    at = token.to(tl.int64)[None, :] * N + row[:, None]
    last = True
    if SPLIT > 1:
        area = T.to(tl.int64) * N
        tl.store(partial_ptr + tl.program_id(1) * area + at, total, mask=inside)
        # Incremented after all threads have stored.
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            total = tl.zeros((OUT, TOKENS), tl.float32)
            for part in range(SPLIT):
                total += tl.load(partial_ptr + part * area + at, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        if GW == 1:
            total *= tl.load(w_scale_ptr + row, mask=row_in, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias_ptr + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + at, total.to(HALF), mask=inside)


def takes(x: Tensor, weight_scale: Tensor) -> bool:
    """Whether the kernel supports x: f[..., K] and weight_scale: f32[N, Gw]."""
    in_features, groups = x.shape[-1], weight_scale.shape[1]
    whole = in_features % (2 * PLANE) == 0 and (groups == 1 or in_features // groups % PLANE == 0)
    return whole and x.dtype in (torch.float16, torch.bfloat16)


def linear_w4a16(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """x: f[..., K], weight: u8[N, K/2], weight_scale: f32[N, Gw], bias: f[N] -> x.dtype[..., N]; see `takes`."""
    in_features, out_features = x.shape[-1], weight.shape[0]
    rows = x.reshape(-1, in_features).contiguous()
    tokens = rows.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if y.numel():
        tile = _tile_for(x.device, out_features, in_features, tokens) if tile is None else tile
        tiles = triton.cdiv(out_features, tile.out) * triton.cdiv(tokens, tile.tokens)
        packed = weight.contiguous().view(torch.int8)
        partial = arrived = packed
        if tile.split > 1:
            partial = torch.empty(tile.split, tokens, out_features, dtype=torch.float32, device=x.device)
            arrived = torch.zeros(tiles, dtype=torch.int32, device=x.device)
        linear_w4a16_kernel[(tiles, tile.split)](
            packed, rows, weight_scale.contiguous(), packed if bias is None else bias.contiguous(), y, partial, arrived,
            tokens, out_features, in_features, weight_scale.shape[1], PLANE, bias is not None,
            tile.out, tile.tokens, tile.step, tile.split,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], out_features)


def _tile_for(device: torch.device, out_features: int, in_features: int, tokens: int) -> Tile:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    shape = SHAPES[next((limit for limit in SHAPES if tokens <= limit), max(SHAPES))]
    return with_split(shape, processors, out_features, in_features, tokens)
