"""qpcompile::rmsnorm_quantize: fused RMS norm, transform and quantization."""

from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.rmsnorm_quantize import cpu
from qpcompile.kernels.rmsnorm_quantize.rule import RULE
from qpcompile.kernels.transform_quantize.reference import SCHEMA, Epilogue, EpilogueArguments


@torch.library.custom_op(
    "qpcompile::rmsnorm_quantize",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor weight, float eps, {SCHEMA}",
)
def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, *epilogue: *EpilogueArguments) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight: f[C] -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.rmsnorm_quantize(x, weight, eps, *epilogue)


@rmsnorm_quantize.register_kernel("cuda")
def _rmsnorm_quantize_cuda(
    x: Tensor, weight: Tensor, eps: float, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.transform_quantize.triton import Rows, rows_quantize

    RULE.check(x, weight, eps, *epilogue)
    return rows_quantize(Rows("rmsnorm", x, weight=weight, eps=eps), Epilogue(*epilogue))


@rmsnorm_quantize.register_fake
def _rmsnorm_quantize_fake(*operands: Any) -> tuple[Tensor, Tensor]:
    return RULE.fake(*operands)


OVERLOAD = torch.ops.qpcompile.rmsnorm_quantize.default
