"""CPU kernel of activation: one C call, or the reference's arithmetic on cache-sized blocks."""

from torch import Tensor

from qpcompile.kernels.activation import reference
from qpcompile.kernels.activation.rule import RULE
from qpcompile.kernels.activation_quantize.cpu import KINDS
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.sums import by_rows


@RULE.checked
def activation(x: Tensor, up: Tensor | None, function: str) -> Tensor:
    """x, up: f[..., C] -> as x."""
    return (_native if native.computes(x) else _torch)(x, up, function)


def _native(x: Tensor, up: Tensor | None, function: str, level: int | None = None) -> Tensor:
    return RowPlan(KINDS[function], x.dtype, x.shape[-1], level=level).stored(x, up)


def _torch(x: Tensor, up: Tensor | None, function: str) -> Tensor:
    def piece(x: Tensor, up: Tensor | None = None) -> tuple[Tensor, ...]:
        return (reference.activation(x, up, function),)

    (y,) = by_rows(piece, *((x,) if up is None else (x, up)))
    return y
