"""GPU kernel of expert_linear_int: one launch for all experts, on slots sorted by expert, without a copy to the host.

Each program multiplies the weights of one expert, OUT rows of them, by up to TOKENS slots that chose it. Which expert
and which slots is computed on the device beforehand (`_blocks`): there are at most slots / TOKENS + experts blocks of
slots, and the programs of those that are not needed end at once. As in linear_int/triton.py the product is transposed,
with the weight as left operand, and unpacked in registers as that kernel does for few tokens:

    low = sum (b & 15) x_low + sum (-8) x_low        high = sum (b & -16) x_high        low + high / 16

Sums are exact in int32, and the epilogue is not contracted: the results are the reference's, bit for bit. Scales per
group of inputs, or more than one per token, take a product of linear_int per expert instead.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.expert_linear.blocks import per_expert
from qpcompile.kernels.linear_int import triton as linear
from qpcompile.kernels.linear_int.packing import plane_width
from qpcompile.kernels.linear_int.tuning import Tile

FEW = Tile(out=64, tokens=16, step=128, warps=4, stages=3)
MANY = Tile(out=128, tokens=64, step=64, warps=8, stages=3)
"""For few and for many slots per expert. Chosen by inspecting machine code, not by benchmarks."""
MANY_SLOTS = 32


@triton.jit
def expert_linear_int_kernel(
    w_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    order_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    first_ptr: tl.tensor,
    end_ptr: tl.tensor,
    y_ptr: tl.tensor,
    N: tl.tensor,
    REPEATS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    PLANE: tl.constexpr,
    PACKED: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """w: i8[E, N, ceil(K/2)], or i8[E, N, K] if not PACKED, q: i8[rows, K], scale: f32[rows], w_scale: f32[E, N],
    order: i64[slots], the slots sorted by expert -> y: f[slots, N].

    expert, first, end: i64[blocks], of each block of slots: its expert, EXPERTS for none, and its part of `order`.
    Slot s reads row s // REPEATS. Grid: (blocks, tiles of N).
    """
    WIDTH: tl.constexpr = (K + 1) // 2 if PACKED else K
    STEPS: tl.constexpr = (PLANE + STEP - 1) // STEP
    ALL_STEPS: tl.constexpr = (WIDTH // PLANE) * STEPS
    ALIGNED: tl.constexpr = (PLANE % STEP == 0) and (K % 2 == 0)

    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert < EXPERTS:
        place = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, TOKENS)
        token_in = place < tl.load(end_ptr + tl.program_id(0))
        slot = tl.load(order_ptr + place, mask=token_in, other=0)
        source = slot // REPEATS
        row = tl.program_id(1) * OUT + tl.arange(0, OUT)
        row_in = row < N
        # Rows beyond the last read the last one: no masks in the loop.
        w_row = w_ptr + (expert * N + tl.minimum(row, N - 1))[:, None] * WIDTH
        x_row = q_ptr + source[None, :] * K
        total = tl.zeros((OUT, TOKENS), tl.int32)
        total_high = tl.zeros((OUT, TOKENS), tl.int32)
        for step in range(ALL_STEPS):
            block = step // STEPS
            byte = step % STEPS * STEP + tl.arange(0, STEP)
            at = w_row + (block * PLANE + byte)[None, :]
            stored = tl.load(at) if ALIGNED else tl.load(at, mask=(byte < PLANE)[None, :], other=0)
            if PACKED:
                low = block * 2 * PLANE + byte
                high = low + PLANE
                low_in = token_in[None, :] & (ALIGNED | (byte < PLANE))[:, None]
                high_in = token_in[None, :] & (ALIGNED | ((byte < PLANE) & (high < K)))[:, None]
                x_low = tl.load(x_row + low[:, None], mask=low_in, other=0)
                x_high = tl.load(x_row + high[:, None], mask=high_in, other=0)
                total = tl.dot(stored & 15, x_low, total, out_dtype=tl.int32)
                total = tl.dot(tl.full((OUT, STEP), -8, tl.int8), x_low, total, out_dtype=tl.int32)
                total_high = tl.dot(stored & -16, x_high, total_high, out_dtype=tl.int32)
            else:
                x_in = token_in[None, :] & (byte < PLANE)[:, None]
                x = tl.load(x_row + byte[:, None], mask=x_in, other=0)
                total = tl.dot(stored, x, total, out_dtype=tl.int32)
        if PACKED:
            total += total_high >> 4
        y = total.to(tl.float32) * tl.load(scale_ptr + source, mask=token_in, other=0.0)[None, :]
        y = y * tl.load(w_scale_ptr + expert * N + row, mask=row_in, other=0.0)[:, None]
        inside = row_in[:, None] & token_in[None, :]
        tl.store(y_ptr + slot[None, :] * N + row[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


def expert_linear_int(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    index: Tensor,
    dtype: torch.dtype,
    bits: int,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Shapes as in reference.py. The results of a slot whose index names no expert are NaN: an error would need a copy
    to the host.
    """
    experts, outputs, _ = weight.shape
    if scale.shape[-1] > 1 or weight_scale.shape[-1] > 1:

        def product(expert: int, rows: Tensor, steps: Tensor) -> Tensor:
            return linear.linear_int(rows, steps, weight[expert], weight_scale[expert], None, dtype, bits)

        return per_expert((q, scale), index, experts, product, scale.new_empty(0, outputs, dtype=dtype))
    y = torch.full((*index.shape, outputs), torch.nan, dtype=dtype, device=q.device)
    if y.numel():
        tile = tile or (MANY if index.numel() > MANY_SLOTS * experts else FEW)
        order, *blocks = _blocks(index.reshape(-1).long(), experts, tile.tokens)
        columns, packed = q.shape[-1], weight.dtype == torch.uint8
        expert_linear_int_kernel[(len(blocks[0]), triton.cdiv(outputs, tile.out))](
            weight.contiguous().view(torch.int8), q.contiguous(), scale.contiguous(), weight_scale.contiguous(), order,
            *blocks, y, outputs, index.shape[1] // q.shape[1], experts, columns,
            plane_width(columns) if packed else columns, packed, tile.out, tile.tokens, tile.step,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _blocks(chosen: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """chosen: i64[slots] -> the slots sorted by expert, and of each block of up to `size` slots of one expert: that
    expert (`experts` where there is no such block), its first place among the sorted slots, and the expert's end.
    """
    ordered, order = chosen.sort(stable=True)
    names = torch.arange(experts, device=chosen.device)
    starts = torch.searchsorted(ordered, names)
    ends = torch.searchsorted(ordered, names, right=True)
    last = torch.cumsum((ends - starts + size - 1) // size, 0)
    count = chosen.numel() // size + min(experts, chosen.numel())
    block = torch.arange(count, device=chosen.device)
    expert = torch.searchsorted(last, block, right=True)
    own = expert.clamp(max=experts - 1)
    before = torch.where(own > 0, last[(own - 1).clamp(min=0)], 0)
    return order, expert, starts[own] + (block - before) * size, ends[own]
