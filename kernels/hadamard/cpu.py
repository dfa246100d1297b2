"""The CPU path of hadamard: the reference on pieces that stay in the cache, bit for bit."""

from torch import Tensor

from qpcompile.kernels.hadamard import reference
from qpcompile.kernels.sums import by_rows


def hadamard(x: Tensor, scale: Tensor | None) -> Tensor:
    """x: f[..., C], scale: f32[C] -> x.dtype[..., C]."""
    (y,) = by_rows(lambda rows: (reference.hadamard(rows, scale),), x)
    return y
