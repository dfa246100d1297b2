"""CPU kernel of hadamard: one C call, or the reference on cache-sized blocks; on float64 both are bit-identical."""

from torch import Tensor

from qpcompile.kernels.hadamard import reference
from qpcompile.kernels.hadamard.rule import RULE
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.sums import by_rows


@RULE.checked
def hadamard(x: Tensor, scale: Tensor | None) -> Tensor:
    """x: f[..., C], scale: f32[C] -> x.dtype[..., C]."""
    return (_native if native.computes(x, scale) else _torch)(x, scale)


def _native(x: Tensor, scale: Tensor | None, level: int | None = None) -> Tensor:
    return RowPlan("plain", x.dtype, x.shape[-1], scale=scale, factors=True, level=level).stored(x)


def _torch(x: Tensor, scale: Tensor | None) -> Tensor:
    (y,) = by_rows(lambda rows: (reference.hadamard(rows, scale),), x)
    return y
