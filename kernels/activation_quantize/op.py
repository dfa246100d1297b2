"""qpcompile::activation_quantize: fused activation function or gated linear unit, transform and quantization."""

from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.activation_quantize import cpu
from qpcompile.kernels.activation_quantize.rule import RULE
from qpcompile.kernels.transform_quantize.reference import SCHEMA, Epilogue, EpilogueArguments


@torch.library.custom_op(
    "qpcompile::activation_quantize",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor? up, str function, {SCHEMA}",
)
def activation_quantize(
    x: Tensor, up: Tensor | None, function: str, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    """x, up: f[..., C], function: one of reference.FUNCTIONS -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.activation_quantize(x, up, function, *epilogue)


@activation_quantize.register_kernel("cuda")
def _activation_quantize_cuda(
    x: Tensor, up: Tensor | None, function: str, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.transform_quantize.triton import Rows, rows_quantize

    RULE.check(x, up, function, *epilogue)
    return rows_quantize(Rows(function, x, up), Epilogue(*epilogue))


@activation_quantize.register_fake
def _activation_quantize_fake(*operands: Any) -> tuple[Tensor, Tensor]:
    return RULE.fake(*operands)


OVERLOAD = torch.ops.qpcompile.activation_quantize.default
