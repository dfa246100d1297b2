"""The GPU path of linear_w4a4: int8 tensor-core products on 4-bit weights that are unpacked in registers.

The product is computed transposed, out^T[N, T] = w[N, K] x[T, K]^T: only the left operand of Hopper's wgmma may come
from registers, and the unpacked weight is there. With b a packed byte (see packing.py), u = q_low + 8:

    b & 15 = u        b & -16 = 16 q_high        16 x_low, from -128 to 112, is an int8
    sum (b & 15) (16 x_low) + (b & -16) x_high - 128 sum x_low = 16 sum (q_low x_low + q_high x_high)

so one int32 accumulator serves both planes, and one number per token removes the offset. Products and sums of the
epilogue are not fused, which keeps its bits those of the reference. `prepare_activations_kernel`
writes 16 x_low beside x_high and that number. All sums are exact.
Layers with scales per group take `linear_w4a4_grouped_kernel`: right for any group, not tuned.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.linear_w4a4.packing import plane_width


@dataclass(frozen=True)
class Tile:
    """One program's share: `out` weight rows by `tokens` tokens, `step` packed bytes per row at a time."""

    out: int
    tokens: int
    step: int
    warps: int
    stages: int


TILES = {
    16: Tile(out=64, tokens=16, step=128, warps=4, stages=4),
    64: Tile(out=64, tokens=64, step=128, warps=4, stages=4),
    256: Tile(out=128, tokens=64, step=128, warps=8, stages=4),
    2048: Tile(out=128, tokens=128, step=64, warps=8, stages=4),
}
"""The tile for up to so many tokens; more tokens take the last one."""


def tile_for(tokens: int) -> Tile:
    """The tile of the smallest entry of TILES that holds `tokens`."""
    return TILES[min((limit for limit in TILES if tokens <= limit), default=max(TILES))]


@triton.jit
def prepare_activations_kernel(
    q_ptr: tl.tensor,
    x_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """q: i8[T, K] -> x: i8[T, K], low planes times 16, sum: i32[T] over the low planes; program t does row t."""
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        low = (column // PLANE) % 2 == 0
        q = tl.load(q_ptr + token * K + column, mask=column < K, other=0).to(tl.int32)
        tl.store(x_ptr + token * K + column, tl.where(low, q * 16, q).to(tl.int8), mask=column < K)
        total += tl.where(low, q, 0)
    tl.store(sum_ptr + token, tl.sum(total, 0))


@triton.jit
def linear_w4a4_kernel(
    w_ptr: tl.tensor,
    x_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """w: i8[N, ceil(K/2)], x: i8[T, K] and sum: i32[T] prepared, scale: f32[T], w_scale: f32[N] -> y: f[T, N]."""
    WIDTH: tl.constexpr = (K + 1) // 2
    BLOCKS: tl.constexpr = WIDTH // PLANE
    STEPS: tl.constexpr = (PLANE + STEP - 1) // STEP
    # Exact planes need no masks along K, which keeps the loads wide.
    ALIGNED: tl.constexpr = (PLANE % STEP == 0) and (K % 2 == 0)
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    w_row = w_ptr + row.to(tl.int64)[:, None] * WIDTH
    x_row = x_ptr + token.to(tl.int64)[None, :] * K
    row_in = row < N
    token_in = token < T
    total = tl.zeros((OUT, TOKENS), tl.int32)
    # One flat loop: only the innermost one is pipelined.
    for step in range(BLOCKS * STEPS):
        block = step // STEPS
        byte = (step % STEPS) * STEP + tl.arange(0, STEP)
        low = block * 2 * PLANE + byte
        high = low + PLANE
        at = w_row + (block * PLANE + byte)[None, :]
        if ALIGNED:
            packed = tl.load(at, mask=row_in[:, None], other=0)
            x_low = tl.load(x_row + low[:, None], mask=token_in[None, :], other=0)
            x_high = tl.load(x_row + high[:, None], mask=token_in[None, :], other=0)
        else:
            low_in = byte < PLANE
            high_in = low_in & (high < K)
            packed = tl.load(at, mask=row_in[:, None] & low_in[None, :], other=0)
            x_low = tl.load(x_row + low[:, None], mask=token_in[None, :] & low_in[:, None], other=0)
            x_high = tl.load(x_row + high[:, None], mask=token_in[None, :] & high_in[:, None], other=0)
        total = tl.dot(packed & 15, x_low, total, out_dtype=tl.int32)
        total = tl.dot(packed & -16, x_high, total, out_dtype=tl.int32)
    low_sum = tl.load(sum_ptr + token, mask=token_in, other=0)
    exact = (total - 128 * low_sum[None, :]) >> 4
    y = exact.to(tl.float32) * tl.load(scale_ptr + token, mask=token_in, other=0.0)[None, :]
    y = y * tl.load(w_scale_ptr + row, mask=row_in, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + token.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=row_in[:, None] & token_in[None, :])


@triton.jit
def linear_w4a4_grouped_kernel(
    w_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    G: tl.constexpr,
    GW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """w: i8[N, ceil(K/2)] packed, q: i8[T, K] codes, scale: f32[T, G], w_scale: f32[N, GW] -> y: f[T, N]."""
    WIDTH: tl.constexpr = (K + 1) // 2
    GROUPS: tl.constexpr = G if G > GW else GW
    SIZE: tl.constexpr = K // GROUPS
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row_in = row < N
    token_in = token < T
    row_at = row.to(tl.int64)
    token_at = token.to(tl.int64)
    y = tl.zeros((OUT, TOKENS), tl.float32)
    for group in range(GROUPS):
        exact = tl.zeros((OUT, TOKENS), tl.int32)
        for start in range(0, SIZE, STEP):
            inner = start + tl.arange(0, STEP)
            inside = inner < SIZE
            k = group * SIZE + inner
            at = w_ptr + row_at[:, None] * WIDTH + (k // (2 * PLANE) * PLANE + k % PLANE)[None, :]
            packed = tl.load(at, mask=row_in[:, None] & inside[None, :], other=0)
            w = tl.where(((k // PLANE) % 2 == 1)[None, :], packed >> 4, (packed & 15) - 8)
            x = tl.load(q_ptr + token_at[None, :] * K + k[:, None], mask=token_in[None, :] & inside[:, None], other=0)
            exact = tl.dot(w, x, exact, out_dtype=tl.int32)
        scale = tl.load(scale_ptr + token_at * G + (group if G > 1 else 0), mask=token_in, other=0.0)
        w_scale = tl.load(w_scale_ptr + row_at * GW + (group if GW > 1 else 0), mask=row_in, other=0.0)
        y += exact.to(tl.float32) * scale[None, :] * w_scale[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + token_at[None, :] * N + row[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=row_in[:, None] & token_in[None, :])


def linear_w4a4(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """q: i8[..., K], scale: f32[..., G], weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw] -> y: dtype[..., N]."""
    in_features, out_features = q.shape[-1], weight.shape[0]
    rows = q.reshape(-1, in_features).contiguous()
    y = torch.empty(rows.shape[0], out_features, dtype=dtype, device=q.device)
    if y.numel():
        tile = tile_for(rows.shape[0]) if tile is None else tile
        scales = scale.contiguous(), weight_scale.contiguous()
        packed = weight.contiguous().view(torch.int8)
        bias = None if bias is None else bias.contiguous()
        run = _run_channel if scale.shape[-1] == weight_scale.shape[-1] == 1 else _run_grouped
        run(rows, packed, scales, bias, y, tile)
    return y.reshape(*q.shape[:-1], out_features)


def prepare_activations(q: Tensor) -> tuple[Tensor, Tensor]:
    """q: i8[T, K] contiguous -> x: i8[T, K] with the low planes times 16, i32[T] the sums of the low planes of q."""
    x = torch.empty_like(q)
    sums = torch.empty(q.shape[0], dtype=torch.int32, device=q.device)
    prepare_activations_kernel[(q.shape[0],)](q, x, sums, q.shape[1], plane_width(q.shape[1]), 1024)
    return x, sums


def _grid(tile: Tile, tokens: int, out_features: int) -> tuple[int, int]:
    return triton.cdiv(out_features, tile.out), triton.cdiv(tokens, tile.tokens)


def _run_channel(
    rows: Tensor, packed: Tensor, scales: tuple[Tensor, Tensor], bias: Tensor | None, y: Tensor, tile: Tile
) -> None:
    """One scale per token and per output channel: the fast kernel writes `y`: f[T, N]."""
    tokens, in_features = rows.shape
    x, sums = prepare_activations(rows)
    linear_w4a4_kernel[_grid(tile, *y.shape)](
        packed, x, sums, *scales, packed if bias is None else bias, y, tokens, y.shape[1],
        in_features, plane_width(in_features), bias is not None, tile.out, tile.tokens, tile.step,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip


def _run_grouped(
    rows: Tensor, packed: Tensor, scales: tuple[Tensor, Tensor], bias: Tensor | None, y: Tensor, tile: Tile
) -> None:
    """Scales per group on one side or both: the general kernel writes `y`: f[T, N]."""
    tokens, in_features = rows.shape
    linear_w4a4_grouped_kernel[_grid(tile, *y.shape)](
        packed, rows, *scales, packed if bias is None else bias, y, tokens, y.shape[1],
        in_features, plane_width(in_features), scales[0].shape[-1], scales[1].shape[-1], bias is not None,
        tile.out, tile.tokens, tile.step,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
