"""CPU kernel of rope: one C call, or the reference; both bit-identical."""

import torch
from torch import Tensor

from qpcompile.kernels.native import library as native
from qpcompile.kernels.rope import reference
from qpcompile.kernels.rope.rule import RULE


@RULE.checked
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: f[..., D], cos, sin: f[..., D], broadcast to x -> x.dtype[..., D]."""
    readable = native.takes(x, cos, sin) and x.dim() in (3, 4)
    return _native(x, cos, sin) if readable else reference.rope(x, cos, sin).contiguous()


def _native(x: Tensor, cos: Tensor, sin: Tensor, level: int | None = None) -> Tensor:
    # The last axis must be contiguous; heads and tokens may have any strides, as projections leave them.
    x, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, cos, sin))
    wide = x if x.dim() == 4 else x[None]
    cosine, sine = cos.expand(wide.shape), sin.expand(wide.shape)
    y = torch.empty(x.shape, dtype=x.dtype)
    native.call("rope", wide, cosine, sine, y, *wide.shape, level=level)
    return y
