"""CPU kernel of rmsnorm_quantize: one C call, or the reference's arithmetic in reused buffers."""

import torch
from torch import Tensor

from qpcompile.kernels.rmsnorm_quantize.rule import RULE
from qpcompile.kernels.sums import by_rows, wide_type
from qpcompile.kernels.transform_quantize.cpu import quantized, readable, row_plan
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments


@RULE.checked
def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, *epilogue: *EpilogueArguments) -> tuple[Tensor, Tensor]:
    """x: f[..., C], weight: f[C] -> q: i8[..., C], scale: f32[..., G]."""
    end = Epilogue(*epilogue)
    return (_native if readable(end, x, weight) else _torch)(x, weight, eps, end)


def _native(x: Tensor, weight: Tensor, eps: float, end: Epilogue, level: int | None = None) -> tuple[Tensor, Tensor]:
    return row_plan("rmsnorm", x, end, level, weight=weight, constant=eps).quantized(x)


def _torch(x: Tensor, weight: Tensor, eps: float, end: Epilogue) -> tuple[Tensor, Tensor]:
    def piece(x: Tensor) -> tuple[Tensor, ...]:
        return quantized(rmsnorm(x, weight, eps), end, x)

    q, scale = by_rows(piece, x)
    return q, scale


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: f[..., C], weight: f[C] -> f32[..., C]."""
    # torch's summation order for a mean depends on the layout; one layout, one result.
    values = x.to(wide_type(x)).contiguous()
    buffer = values * values
    norm = buffer.mean(-1, keepdim=True).add_(eps).sqrt_()
    return torch.div(values, norm, out=buffer).mul_(weight).float()
