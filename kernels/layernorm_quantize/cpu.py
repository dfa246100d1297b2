"""CPU kernel of layernorm_quantize: one C call, or the reference's arithmetic in reused buffers."""

import torch
from torch import Tensor

from qpcompile.kernels.layernorm_quantize.rule import RULE
from qpcompile.kernels.sums import by_rows, wide_type
from qpcompile.kernels.transform_quantize.cpu import quantized, readable, row_plan
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments


@RULE.checked
def layernorm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight, bias: f[C] -> q: i8[..., C], scale: f32[..., G]."""
    end = Epilogue(*epilogue)
    run = _native if readable(end, x, weight, bias) and weight.dtype == bias.dtype else _torch
    return run(x, weight, bias, eps, end)


def _native(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, end: Epilogue, level: int | None = None
) -> tuple[Tensor, Tensor]:
    return row_plan("layernorm", x, end, level, weight=weight, bias=bias, constant=eps).quantized(x)


def _torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, end: Epilogue) -> tuple[Tensor, Tensor]:
    def piece(x: Tensor) -> tuple[Tensor, ...]:
        return quantized(layernorm(x, weight, bias, eps), end, x)

    q, scale = by_rows(piece, x)
    return q, scale


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight, bias: f[C] -> f32[..., C]."""
    # torch's summation order for a mean depends on the layout; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    values = values - values.mean(-1, keepdim=True)
    buffer = values * values
    norm = buffer.mean(-1, keepdim=True).add_(eps).sqrt_()
    return torch.div(values, norm, out=buffer).mul_(weight).add_(bias).float()
