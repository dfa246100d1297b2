"""GPU kernel of linear_int: int8 tensor-core products, with 4-bit weights that are unpacked in registers.

The product is computed transposed, out^T[N, T] = w[N, K] x[T, K]^T: only the left operand of Hopper's wgmma can be in
registers, where the unpacked weight is. With b a packed byte (see packing.py), u = q_low + 8:

    b & 15 = u        b & -16 = 16 q_high

Many tokens: `prepare_activations_kernel` writes 16 x_low (-128 to 112, an int8) next to x_high, and the sum of x_low.
Both planes are then one product over twice the columns with one accumulator, and one term per token removes the offset:

    sum (b & 15) (16 x_low) + (b & -16) x_high - 128 sum x_low = 16 sum (q_low x_low + q_high x_high)

8-bit codes times 16 do not fit an int8, and shifting the high plane of the weight takes more instructions than products
leave free. For those, two products have accumulators of their own (and tiles of half the size where registers are
short), and only the sum is prepared:

    low = sum (b & 15) x_low - 8 sum x_low        high = sum (b & -16) x_high        low + high / 16

Few tokens (RAW): codes of any bits unprepared, and the offset by a third product; tensor cores are memory-bound there,
and saving a launch is worth more:

    low = sum (b & 15) x_low + sum (-8) x_low

All sums are exact in int32, in any order: programs that split the columns of a tile (split-K) add atomically, and the
last one to arrive applies the scales. Multiplications and additions of the epilogue are not contracted to FMA, which
keeps it bit-identical to the reference. 8-bit weights need no unpacking: triton_grouped.py.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.linear_int.packing import plane_width
from qpcompile.kernels.linear_int.triton_grouped import run_grouped
from qpcompile.kernels.linear_int.tuning import RAW_TOKENS, Tile, start_tile, tile_for

NEIGHBOURS = 8
"""Consecutive tiles of tokens on one tile of weights, so that both stay in the cache."""


MOST_SUMS = 64
"""Registers per thread that each of two accumulators may take."""


@triton.jit
def prepare_activations_kernel(
    q_ptr: tl.tensor,
    x_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """q: i8[T, K] -> sum: i32[T] over the low planes and, if FACTOR is 16, x: i8[T, K], low planes times 16.

    Program t processes row t.
    """
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        low = (column // PLANE) % 2 == 0
        q = tl.load(q_ptr + token * K + column, mask=column < K, other=0).to(tl.int32)
        if FACTOR > 1:
            tl.store(x_ptr + token * K + column, tl.where(low, q * FACTOR, q).to(tl.int8), mask=column < K)
        total += tl.where(low, q, 0)
    tl.store(sum_ptr + token, tl.sum(total, 0))


@triton.jit
def without_offset(total: tl.tensor, sum_at: tl.tensor, token_in: tl.tensor, FACTOR: tl.constexpr) -> tl.tensor:
    """total: i32[OUT, TOKENS] of unsigned low planes, times FACTOR -> the exact sums, from the prepared ones."""
    total -= 8 * FACTOR * tl.load(sum_at, mask=token_in, other=0)[None, :]
    return total >> 4 if FACTOR == 16 else total


@triton.jit
def finish_tile(
    exact: tl.tensor,
    scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """exact: i32[OUT, TOKENS] -> y: f[T, N] at `row` and `token`, scaled, with bias; the residual is added after y."""
    inside = (row < N)[:, None] & (token < T)[None, :]
    y = exact.to(tl.float32) * tl.load(scale_ptr + token, mask=token < T, other=0.0)[None, :]
    y = y * tl.load(w_scale_ptr + row, mask=row < N, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    y = y.to(y_ptr.dtype.element_ty)
    at = token.to(tl.int64)[None, :] * N + row[:, None]
    if HAS_RESIDUAL:
        # Rounded, then added, as two separate operators would do.
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + residual).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def linear_int_kernel(
    w_ptr: tl.tensor,
    x_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    workspace_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    RAW: tl.constexpr,
    FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
) -> None:
    """w: i8[N, ceil(K/2)], x: i8[T, K], scale: f32[T], w_scale: f32[N] -> y: f[T, N].

    x and sum: i32[T] are prepared with this FACTOR, or x are codes and sum is not read (RAW). workspace: i32[T * N +
    tiles], zeros, is used if SPLIT > 1. Grid: (tiles, SPLIT).
    """
    WIDTH: tl.constexpr = (K + 1) // 2
    STEPS: tl.constexpr = (PLANE + STEP - 1) // STEP
    ALL_STEPS: tl.constexpr = (WIDTH // PLANE) * STEPS
    SHARE: tl.constexpr = (ALL_STEPS + SPLIT - 1) // SPLIT
    # Products of the two planes have accumulators of their own.
    APART: tl.constexpr = RAW or FACTOR == 1
    # Full planes need no masks along K, which keeps the loads wide.
    ALIGNED: tl.constexpr = (PLANE % STEP == 0) and (K % 2 == 0)

    tile = tl.program_id(0)
    stripe = NEIGHBOURS * tl.cdiv(N, OUT)
    first = tile // stripe * NEIGHBOURS
    width = tl.minimum(tl.cdiv(T, TOKENS) - first, NEIGHBOURS)
    row = tile % stripe // width * OUT + tl.arange(0, OUT)
    token = (first + tile % stripe % width) * TOKENS + tl.arange(0, TOKENS)
    token_in = token < T
    # Rows beyond the last read the last one: no masks in the loop. Few tokens use masks, to read nothing twice.
    w_row = w_ptr + tl.minimum(row, N - 1).to(tl.int64)[:, None] * WIDTH
    x_row = x_ptr + (token if RAW else tl.minimum(token, T - 1)).to(tl.int64)[None, :] * K

    total = tl.zeros((OUT, TOKENS), tl.int32)
    total_high = tl.zeros((OUT, TOKENS), tl.int32)
    begin = tl.program_id(1) * SHARE
    # One flat loop: only the innermost loop is pipelined.
    for step in range(begin, tl.minimum(begin + SHARE, ALL_STEPS)):
        block = step // STEPS
        offset = step % STEPS * STEP
        byte = offset + tl.arange(0, STEP)
        at = w_row + (block * PLANE + byte)[None, :]
        packed = tl.load(at) if ALIGNED else tl.load(at, mask=(byte < PLANE)[None, :], other=0)
        if APART:
            low = block * 2 * PLANE + byte
            high = low + PLANE
            low_in = token_in[None, :] & (ALIGNED | (byte < PLANE))[:, None]
            high_in = token_in[None, :] & (ALIGNED | ((byte < PLANE) & (high < K)))[:, None]
            x_low = tl.load(x_row + low[:, None], mask=low_in, other=0)
            x_high = tl.load(x_row + high[:, None], mask=high_in, other=0)
            total = tl.dot(packed & 15, x_low, total, out_dtype=tl.int32)
            if RAW:
                total = tl.dot(tl.full((OUT, STEP), -8, tl.int8), x_low, total, out_dtype=tl.int32)
            total_high = tl.dot(packed & -16, x_high, total_high, out_dtype=tl.int32)
        else:
            # The low plane, then the high one: one product waits once, two products wait twice.
            both = tl.arange(0, 2 * STEP)
            place = offset + both % STEP
            column = block * 2 * PLANE + both // STEP * PLANE + place
            if ALIGNED:
                x = tl.load(x_row + column[:, None])
            else:
                x = tl.load(x_row + column[:, None], mask=((place < PLANE) & (column < K))[:, None], other=0)
            w = tl.join(packed & 15, packed & -16).permute((0, 2, 1)).reshape((OUT, 2 * STEP))
            total = tl.dot(w, x, total, out_dtype=tl.int32)
    if APART:
        total += total_high >> 4

    if SPLIT > 1:
        at = workspace_ptr + token.to(tl.int64)[None, :] * N + row[:, None]
        inside = (row < N)[:, None] & token_in[None, :]
        tl.atomic_add(at, total, mask=inside, sem="relaxed")
        # Incremented after all threads have added.
        tl.debug_barrier()
        arrived = tl.atomic_add(workspace_ptr + T.to(tl.int64) * N + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            total = tl.load(at, mask=inside, other=0, cache_modifier=".cg")
            if not RAW:
                total = without_offset(total, sum_ptr + token, token_in, FACTOR)
            finish_tile(
                total, scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, y_ptr, row, token, T, N, HAS_BIAS, HAS_RESIDUAL
            )
    else:
        if not RAW:
            total = without_offset(total, sum_ptr + token, token_in, FACTOR)
        finish_tile(
            total, scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, y_ptr, row, token, T, N, HAS_BIAS, HAS_RESIDUAL
        )


def linear_int(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    residual: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """q: i8[..., K], scale: f32[..., G], weight: u8[N, ceil(K/2)] | i8[N, K], weight_scale: f32[N, Gw] -> f[..., N].

    `bits` are those of the codes q, 4 or 8. `residual`: dtype[..., N] is added to the rounded y as a separate operator
    would do; with scales per group and 8-bit weights it is one.
    """
    in_features, out_features = q.shape[-1], weight.shape[0]
    rows = q.reshape(-1, in_features).contiguous()
    y = torch.empty(rows.shape[0], out_features, dtype=dtype, device=q.device)
    if y.numel():
        tile = device_tile(q.device, out_features, *rows.shape) if tile is None else tile
        scales = scale.contiguous(), weight_scale.contiguous()
        stored = weight.contiguous().view(torch.int8)
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else residual.reshape(y.shape).contiguous()
        packed = weight.dtype == torch.uint8
        if packed and scale.shape[-1] == weight_scale.shape[-1] == 1:
            _run(rows, stored, scales, bias, residual, y, tile, bits)
        else:
            run_grouped(rows, stored, scales, bias, y, tile, packed)
            y = y if residual is None else y + residual
    return y.reshape(*q.shape[:-1], out_features)


def device_tile(device: torch.device, out_features: int, tokens: int, in_features: int) -> Tile:
    """The tile for a layer [N, K] on that many tokens; the interpreter uses the rule for one multiprocessor."""
    if device.type != "cuda":
        return start_tile(1, out_features, in_features, tokens)
    gpu = torch.cuda.get_device_properties(device)
    return tile_for(gpu.name, gpu.multi_processor_count, out_features, in_features, tokens)


def tile_of_two(tile: Tile) -> Tile:
    """The tile for two accumulators instead of one."""
    return replace(tile, tokens=tile.tokens // 2) if tile.sums > MOST_SUMS else tile


def prepare_activations(q: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """q: i8[T, K] contiguous -> x: i8[T, K], the low planes times `factor`, and i32[T], the sums of q's low planes."""
    x = q if factor == 1 else torch.empty_like(q)
    sums = torch.empty(q.shape[0], dtype=torch.int32, device=q.device)
    prepare_activations_kernel[(q.shape[0],)](q, x, sums, q.shape[1], plane_width(q.shape[1]), factor, 2048)
    return x, sums


def _run(
    rows: Tensor,
    packed: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    tile: Tile,
    bits: int,
) -> None:
    """One scale per token and per output channel: the tuned kernel writes `y`: f[T, N]."""
    (tokens, in_features), out_features = rows.shape, y.shape[1]
    raw, factor = tokens <= RAW_TOKENS, 16 if bits == 4 else 1
    tile = tile_of_two(tile) if factor == 1 and not raw else tile
    x, sums = (rows, rows) if raw else prepare_activations(rows, factor)
    tiles = triton.cdiv(out_features, tile.out) * triton.cdiv(tokens, tile.tokens)
    workspace = packed
    if tile.split > 1:
        workspace = torch.zeros(y.numel() + tiles, dtype=torch.int32, device=y.device)
    linear_int_kernel[(tiles, tile.split)](
        packed, x, sums, *scales, packed if bias is None else bias, y if residual is None else residual, y, workspace,
        tokens, out_features, in_features, plane_width(in_features), raw, factor, bias is not None,
        residual is not None, tile.out, tile.tokens, tile.step, tile.split, NEIGHBOURS,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
