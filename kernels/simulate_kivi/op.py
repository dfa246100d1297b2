"""qpcompile::simulate_kivi: floating-point simulation on every device, without an ONNX translation."""

import torch
from torch import Tensor

from qpcompile.kernels.simulate_kivi import reference
from qpcompile.kernels.simulate_kivi.rule import RULE


@torch.library.custom_op("qpcompile::simulate_kivi", mutates_args=())
def simulate_kivi(x: Tensor, levels: int, key: bool) -> Tensor:
    """x: f[B, H, S, D], codes 0..levels -> x.dtype[B, H, S, D]."""
    RULE.check(x, levels, key)
    return reference.simulate_kivi(x, levels, key)


@simulate_kivi.register_fake
def _(x: Tensor, levels: int, key: bool) -> Tensor:
    return RULE.fake(x, levels, key)


OVERLOAD = torch.ops.qpcompile.simulate_kivi.default
