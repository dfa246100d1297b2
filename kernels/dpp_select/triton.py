"""GPU kernel of dpp_select: the kernel matrix as one product, then all iterations of a row in one program.

The iterations are sequential, so they are one launch instead of a dozen each. float64 like the reference: on
data-centre GPUs it has half the speed of float32, and equal tokens must tie. Memory is O(S^2) and not O(S T): 2.6 MB at
576 tokens, 134 MB at 4,096.
"""

# Kernel bodies and launches are Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpcompile.kernels.dpp_select.reference import RANK_FLOOR, TINY, unit_rows

FLOOR, LEAST = tl.constexpr(RANK_FLOOR), tl.constexpr(TINY)


@triton.jit
def greedy_kernel(
    matrix_ptr: tl.tensor,
    counted_ptr: tl.tensor,
    turns_ptr: tl.tensor,
    basis_ptr: tl.tensor,
    priority_ptr: tl.tensor,
    S: tl.tensor,
    SIZE: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """matrix: f64[B, S, S], counted: u8[B, S], turns: i64[1] -> priority: f32[B, S], of those picked; program b, row b.

    SIZE >= S slots; basis: f64[B, S, S], the rows of earlier iterations, read PIECE at a time.
    """
    batch = tl.program_id(0).to(tl.int64)
    matrix_ptr += batch * S * S
    basis_ptr += batch * S * S
    token = tl.arange(0, SIZE)
    inside = token < S
    counted = inside & (tl.load(counted_ptr + batch * S + token, mask=inside, other=0) != 0)
    gain = tl.load(matrix_ptr + token * (S + 1), mask=inside, other=0.0)
    gain = tl.where(counted, gain, float("-inf"))
    floor = FLOOR * tl.max(gain, 0)
    priority = tl.load(priority_ptr + batch * S + token, mask=inside, other=0.0)
    turns = tl.load(turns_ptr).to(tl.int32)
    for turn in range(turns):
        # Compared in float32, so that equal tokens tie; the lower index wins.
        rough = gain.to(tl.float32)
        best = tl.min(tl.where(rough == tl.max(rough, 0), token, SIZE), 0)
        peak = tl.max(tl.where(token == best, gain, float("-inf")), 0)
        if peak > floor:
            row = tl.load(matrix_ptr + best * S + token, mask=inside, other=0.0)
            for start in range(0, turn, PIECE):
                before = start + tl.arange(0, PIECE)
                own = tl.load(basis_ptr + before * S + best, mask=before < turn, other=0.0)
                here = (before < turn)[:, None] & inside[None, :]
                others = tl.load(basis_ptr + before[:, None] * S + token[None, :], mask=here, other=0.0)
                row -= tl.sum(own[:, None] * others, 0)
            part = row / tl.sqrt(tl.maximum(peak, LEAST))
            tl.store(basis_ptr + turn * S + token, part, mask=inside)
            # In the next iteration another thread reads what this one wrote.
            tl.debug_barrier()
            gain = tl.where(token == best, float("-inf"), gain - part * part)
            priority = tl.where(token == best, (S - turn).to(tl.float32), priority)
    tl.store(priority_ptr + batch * S + token, priority, mask=inside)


def dpp_select(features: Tensor, relevance: Tensor, counted: Tensor, budget: Tensor) -> Tensor:
    """Shapes as in reference.py; nothing is copied back to the host."""
    unit = unit_rows(features)
    weight = torch.where(counted, relevance.double(), 0.0)
    matrix = (unit @ unit.mT) * weight[:, :, None] * weight[:, None]
    top = torch.where(counted, relevance, -torch.inf).amax(1, keepdim=True)
    priority = torch.where(counted, relevance - top, 0.0)
    if priority.numel():
        turns = torch.minimum(budget, counted.sum(1)).amax(0, keepdim=True)
        length = counted.shape[1]
        flags = counted.contiguous().view(torch.uint8)
        size = triton.next_power_of_2(length)
        greedy_kernel[(len(counted),)](
            matrix.contiguous(), flags, turns, torch.empty_like(matrix), priority, length, size,
            max(min(8192 // size, 8), 1), num_warps=min(max(size // 64, 1), 16), enable_fp_fusion=False,
        )  # fmt: skip
    return priority
