"""qpcompile::double: y = 2 x."""

from torch import Tensor


def double(x: Tensor) -> Tensor:
    return 2 * x
