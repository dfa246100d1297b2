"""GPU kernel of linear_int with scales per group of any size, or 8-bit weights: correct, not tuned (see triton.py)."""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.linear_int.packing import plane_width
from qpcompile.kernels.linear_int.tuning import Tile


@triton.jit
def linear_int_grouped_kernel(
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
    PACKED: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """w: i8[N, ceil(K/2)] (PACKED) | i8[N, K], q: i8[T, K], scale: f32[T, G], w_scale: f32[N, GW] -> y: f[T, N]."""
    WIDTH: tl.constexpr = (K + 1) // 2 if PACKED else K
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
            byte = k // (2 * PLANE) * PLANE + k % PLANE if PACKED else k
            at = w_ptr + row_at[:, None] * WIDTH + byte[None, :]
            w = tl.load(at, mask=row_in[:, None] & inside[None, :], other=0)
            if PACKED:
                w = tl.where(((k // PLANE) % 2 == 1)[None, :], w >> 4, (w & 15) - 8)
            x = tl.load(q_ptr + token_at[None, :] * K + k[:, None], mask=token_in[None, :] & inside[:, None], other=0)
            exact = tl.dot(w, x, exact, out_dtype=tl.int32)
        scale = tl.load(scale_ptr + token_at * G + (group if G > 1 else 0), mask=token_in, other=0.0)
        w_scale = tl.load(w_scale_ptr + row_at * GW + (group if GW > 1 else 0), mask=row_in, other=0.0)
        y += exact.to(tl.float32) * scale[None, :] * w_scale[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + token_at[None, :] * N + row[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=row_in[:, None] & token_in[None, :])


def run_grouped(
    rows: Tensor,
    stored: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    y: Tensor,
    tile: Tile,
    packed: bool,
) -> None:
    """rows: i8[T, K], stored: i8[N, ceil(K/2)] if packed, else i8[N, K], scales: f32[T, G], f32[N, Gw] -> f[T, N]."""
    tokens, in_features = rows.shape
    grid = triton.cdiv(y.shape[1], tile.out), triton.cdiv(tokens, tile.tokens)
    linear_int_grouped_kernel[grid](
        stored, rows, *scales, stored if bias is None else bias, y, tokens, y.shape[1],
        in_features, plane_width(in_features), scales[0].shape[-1], scales[1].shape[-1], bias is not None, packed,
        tile.out, tile.tokens, tile.step,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
