"""GPU kernel of kv_read: dequantize codes, a block of tokens and heads per program."""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


@triton.jit
def kv_read_kernel(
    codes_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    y_ptr: tl.tensor,
    R: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """codes: u8[R, WIDTH], affine: f32[R, 2] -> y: f[R, D]."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, PAD)[None, :]
    here = (row < R) & (column < WIDTH)
    codes = tl.load(codes_ptr + row * WIDTH + column, mask=here, other=0).to(tl.int32)
    scale = tl.load(affine_ptr + row * 2, mask=row < R, other=0.0)
    zero = tl.load(affine_ptr + row * 2 + 1, mask=row < R, other=0.0)
    low = codes
    if BITS == 4:
        low = codes & 15
        high = ((codes >> 4).to(tl.float32) - zero) * scale
        tl.store(y_ptr + row * D + WIDTH + column, high.to(y_ptr.dtype.element_ty), mask=here & (column + WIDTH < D))
    tl.store(y_ptr + row * D + column, ((low.to(tl.float32) - zero) * scale).to(y_ptr.dtype.element_ty), mask=here)


def kv_read(codes: Tensor, affine: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """codes: u8[B, H, S, ceil(D bits / 8)], affine: f32[B, H, S, 2] -> dtype[B, H, S, D]."""
    codes, affine = codes.contiguous(), affine.contiguous()
    y = torch.empty((*codes.shape[:-1], head_dim), dtype=dtype, device=codes.device)
    width, rows = codes.shape[-1], affine.numel() // 2
    if y.numel():
        kv_read_kernel[(triton.cdiv(rows, ROWS),)](
            codes, affine, y, rows, head_dim, width, bits, triton.next_power_of_2(width), ROWS,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return y
