"""CPU kernel of activation_quantize: one C call, or the reference's arithmetic on cache-sized blocks."""

from torch import Tensor

from qpcompile.kernels.activation_quantize.reference import activation
from qpcompile.kernels.activation_quantize.rule import RULE
from qpcompile.kernels.native.rows import Kind
from qpcompile.kernels.sums import by_rows
from qpcompile.kernels.transform_quantize.cpu import quantized, readable, row_plan
from qpcompile.kernels.transform_quantize.reference import Epilogue, EpilogueArguments

KINDS: dict[str, Kind] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "gelu_sigmoid": "gelu_sigmoid"}
"""The row kind of each function."""


@RULE.checked
def activation_quantize(
    x: Tensor, up: Tensor | None, function: str, *epilogue: *EpilogueArguments
) -> tuple[Tensor, Tensor]:
    """x, up: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    end = Epilogue(*epilogue)
    return (_native if readable(end, x) else _torch)(x, up, function, end)


def _native(
    x: Tensor, up: Tensor | None, function: str, end: Epilogue, level: int | None = None
) -> tuple[Tensor, Tensor]:
    return row_plan(KINDS[function], x, end, level).quantized(x, up)


def _torch(x: Tensor, up: Tensor | None, function: str, end: Epilogue) -> tuple[Tensor, Tensor]:
    def piece(x: Tensor, up: Tensor | None = None) -> tuple[Tensor, ...]:
        return quantized(activation(x, up, function), end, x)

    q, scale = by_rows(piece, *((x,) if up is None else (x, up)))
    return q, scale
