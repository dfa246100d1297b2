"""qpcompile::layernorm_quantize: fused layer norm, transform and quantization."""

from typing import Any

import torch
from torch import Tensor

from qpcompile.kernels.layernorm_quantize import cpu
from qpcompile.kernels.layernorm_quantize.rule import RULE
from qpcompile.kernels.transform_quantize.reference import SCHEMA, Epilogue, EpilogueArguments


@torch.library.custom_op(
    "qpcompile::layernorm_quantize",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor weight, Tensor bias, float eps, {SCHEMA}",
)
def layernorm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight, bias: f[C] -> q: i8[..., C], scale: f32[..., G]."""
    return cpu.layernorm_quantize(x, weight, bias, eps, *epilogue)


@layernorm_quantize.register_kernel("cuda")
def _layernorm_quantize_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    from qpcompile.kernels.transform_quantize.triton import Rows, rows_quantize

    RULE.check(x, weight, bias, eps, *epilogue)
    return rows_quantize(Rows("layernorm", x, weight=weight, bias=bias, eps=eps), Epilogue(*epilogue))


@layernorm_quantize.register_fake
def _layernorm_quantize_fake(*operands: Any) -> tuple[Tensor, Tensor]:
    return RULE.fake(*operands)


OVERLOAD = torch.ops.qpcompile.layernorm_quantize.default
