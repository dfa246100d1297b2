"""qpcompile::attention_step: a decode step's attention, from the projection of its heads to the next one's codes."""

from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.attention_step import cpu
from qpcompile.kernels.attention_step.rule import RULE
from qpcompile.kernels.rope_kv_write import op

RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op(
    "qpcompile::attention_step",
    mutates_args=(),
    device_types="cpu",
    schema=f"({op.SCHEMA}, Tensor k_codes, Tensor k_affine, Tensor v_codes, Tensor v_affine, Tensor? center, "
    "Tensor? mask, float scale, Tensor? transform_scale, bool rotate_result, Tensor? left, Tensor? right, "
    f"Tensor? shift, int group_size, float clip_ratio, int bits) -> {RESULTS}",
)
def attention_step(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Operands and results as in reference.py."""
    return cpu.attention_step(*operands)


@attention_step.register_kernel("cuda")
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from qpcompile.kernels.attention_step import triton

    RULE.check(*operands)
    return triton.attention_step(*operands)


@attention_step.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return RULE.fake(*operands)


OVERLOAD = torch.ops.qpcompile.attention_step.default
