"""GPU kernel of linear_int: int8 tensor-core products on 4-bit weights that are unpacked in registers.

The product is computed transposed, out^T[N, T] = w[N, K] x[T, K]^T: only the left operand of Hopper's wgmma can be in
registers, where the unpacked weight is. With b a packed byte (see packing.py), u = q_low + 8:

    b & 15 = u        b & -16 = 16 q_high

Many tokens: `prepare_activations_kernel` writes 16 x_low (-128 to 112, an int8) next to x_high, and the sum of x_low.
Both planes are then one product over twice the columns with one accumulator, and one term per token removes the offset:

    sum (b & 15) (16 x_low) + (b & -16) x_high - 128 sum x_low = 16 sum (q_low x_low + q_high x_high)

Few tokens (RAW): any 8-bit codes unprepared, two accumulators, and the offset by a third product; tensor cores are
memory-bound there, and saving a launch is worth more:

    low = sum (b & 15) x_low + sum (-8) x_low        high = sum (b & -16) x_high        low + high / 16

All sums are exact in int32, in any order: programs that split the columns of a tile (split-K) add atomically, and the
last one to arrive applies the scales. Multiplications and additions of the epilogue are not contracted to FMA, which
keeps it bit-identical to the reference.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.linear_int.packing import plane_width
from qpcompile.kernels.linear_int.triton_grouped import run_grouped
from qpcompile.kernels.linear_int.tuning import RAW_TOKENS, Tile, start_tile, tile_for

NEIGHBOURS = 8
"""Consecutive tiles of tokens on one tile of weights, so that both stay in the cache."""


@triton.jit
def prepare_activations_kernel(
    q_ptr: tl.tensor,
    x_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """q: i8[T, K] -> x: i8[T, K], low planes times 16, sum: i32[T] over the low planes; program t processes row t."""
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
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
) -> None:
    """w: i8[N, ceil(K/2)], x: i8[T, K], scale: f32[T], w_scale: f32[N] -> y: f[T, N].

    x and sum: i32[T] are prepared, or x are codes and sum is not read (RAW). workspace: i32[T * N + tiles], zeros, is
    used if SPLIT > 1. Grid: (tiles, SPLIT).
    """
    WIDTH: tl.constexpr = (K + 1) // 2
    STEPS: tl.constexpr = (PLANE + STEP - 1) // STEP
    ALL_STEPS: tl.constexpr = (WIDTH // PLANE) * STEPS
    SHARE: tl.constexpr = (ALL_STEPS + SPLIT - 1) // SPLIT
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
        if RAW:
            low = block * 2 * PLANE + byte
            high = low + PLANE
            low_in = token_in[None, :] & (ALIGNED | (byte < PLANE))[:, None]
            high_in = token_in[None, :] & (ALIGNED | ((byte < PLANE) & (high < K)))[:, None]
            x_low = tl.load(x_row + low[:, None], mask=low_in, other=0)
            x_high = tl.load(x_row + high[:, None], mask=high_in, other=0)
            total = tl.dot(packed & 15, x_low, total, out_dtype=tl.int32)
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
    if RAW:
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
                total = (total - 128 * tl.load(sum_ptr + token, mask=token_in, other=0)[None, :]) >> 4
            finish_tile(
                total, scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, y_ptr, row, token, T, N, HAS_BIAS, HAS_RESIDUAL
            )
    else:
        if not RAW:
            total = (total - 128 * tl.load(sum_ptr + token, mask=token_in, other=0)[None, :]) >> 4
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
    *,
    residual: Tensor | None = None,
    bits: int = 4,
    tile: Tile | None = None,
) -> Tensor:
    """q: i8[..., K], scale: f32[..., G], weight: u8[N, ceil(K/2)], weight_scale: f32[N, Gw] -> y: dtype[..., N].

    `residual`: dtype[..., N] is added to the rounded y as a separate operator would do; with scales per group it is
    one. `bits` are those of the codes q, 4 or 8.
    """
    in_features, out_features = q.shape[-1], weight.shape[0]
    rows = q.reshape(-1, in_features).contiguous()
    y = torch.empty(rows.shape[0], out_features, dtype=dtype, device=q.device)
    if y.numel():
        tile = device_tile(q.device, out_features, *rows.shape) if tile is None else tile
        scales = scale.contiguous(), weight_scale.contiguous()
        packed = weight.contiguous().view(torch.int8)
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else residual.reshape(y.shape).contiguous()
        if scale.shape[-1] == weight_scale.shape[-1] == 1:
            _run(rows, packed, scales, bias, residual, y, tile, raw=bits == 8 or rows.shape[0] <= RAW_TOKENS)
        else:
            run_grouped(rows, packed, scales, bias, y, tile)
            y = y if residual is None else y + residual
    return y.reshape(*q.shape[:-1], out_features)


def device_tile(device: torch.device, out_features: int, tokens: int, in_features: int) -> Tile:
    """The tile for a layer [N, K] on that many tokens; the interpreter uses the rule for one multiprocessor."""
    if device.type != "cuda":
        return start_tile(1, out_features, in_features, tokens)
    gpu = torch.cuda.get_device_properties(device)
    return tile_for(gpu.name, gpu.multi_processor_count, out_features, in_features, tokens)


def prepare_activations(q: Tensor) -> tuple[Tensor, Tensor]:
    """q: i8[T, K] contiguous -> x: i8[T, K] with the low planes times 16, i32[T] the sums of the low planes of q."""
    x = torch.empty_like(q)
    sums = torch.empty(q.shape[0], dtype=torch.int32, device=q.device)
    prepare_activations_kernel[(q.shape[0],)](q, x, sums, q.shape[1], plane_width(q.shape[1]), 2048)
    return x, sums


def _run(
    rows: Tensor,
    packed: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    tile: Tile,
    raw: bool,
) -> None:
    """One scale per token and per output channel: the tuned kernel writes `y`: f[T, N]."""
    (tokens, in_features), out_features = rows.shape, y.shape[1]
    x, sums = (rows, rows) if raw else prepare_activations(rows)
    tiles = triton.cdiv(out_features, tile.out) * triton.cdiv(tokens, tile.tokens)
    workspace = packed
    if tile.split > 1:
        workspace = torch.zeros(y.numel() + tiles, dtype=torch.int32, device=y.device)
    linear_int_kernel[(tiles, tile.split)](
        packed, x, sums, *scales, packed if bias is None else bias, y if residual is None else residual, y, workspace,
        tokens, out_features, in_features, plane_width(in_features), raw, bias is not None, residual is not None,
        tile.out, tile.tokens, tile.step, tile.split, NEIGHBOURS,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
