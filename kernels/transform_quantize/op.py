"""qpcompile::transform_quantize: online transform and quantization of a linear's input."""

from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.transform_quantize import cpu
from qpcompile.kernels.transform_quantize.reference import SCHEMA, EpilogueArguments
from qpcompile.kernels.transform_quantize.rule import RULE


@torch.library.custom_op(
    "qpcompile::transform_quantize", mutates_args=(), device_types="cpu", schema=f"(Tensor x, {SCHEMA}"
)
def transform_quantize(x: Tensor, *epilogue: *EpilogueArguments) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]; the epilogue as in reference.py."""
    return cpu.transform_quantize(x, *epilogue)


@transform_quantize.register_kernel("cuda")
def _transform_quantize_cuda(*operands: Any) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.transform_quantize import triton

    RULE.check(*operands)
    return triton.transform_quantize(*operands)


@transform_quantize.register_fake
def _transform_quantize_fake(*operands: Any) -> tuple[Tensor, Tensor]:
    return RULE.fake(*operands)


OVERLOAD = torch.ops.qpcompile.transform_quantize.default
