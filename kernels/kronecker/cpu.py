"""CPU kernel of kronecker: one C call, or the reference on cache-sized blocks; on float64 both are bit-identical."""

from torch import Tensor

from qpcompile.kernels.kronecker import reference
from qpcompile.kernels.kronecker.rule import RULE
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.sums import by_rows


@RULE.checked
def kronecker(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x: f[..., A*c], scale: f32[A*c], left: f32[A, A], right: f32[c, c] -> x.dtype[..., A*c]."""
    reference.check_factors(x.shape[-1], left, right)
    return (_native if native.computes(x, scale, left, right) else _torch)(x, scale, left, right)


def _native(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor, level: int | None = None) -> Tensor:
    return RowPlan("plain", x.dtype, x.shape[-1], scale=scale, factors=(left, right), level=level).stored(x)


def _torch(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    (y,) = by_rows(lambda rows: (reference.kronecker(rows, scale, left, right),), x)
    return y
