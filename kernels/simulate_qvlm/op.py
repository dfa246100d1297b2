"""qpcompile::simulate_qvlm: floating-point simulation on every device, without an ONNX translation."""

import torch
from torch import Tensor

from qpcompile.kernels.simulate_qvlm import reference
from qpcompile.kernels.simulate_qvlm.rule import RULE


@torch.library.custom_op("qpcompile::simulate_qvlm", mutates_args=())
def simulate_qvlm(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x: f[..., C], low and high: f32[C] -> x.dtype[..., C]."""
    RULE.check(x, low, high)
    return reference.simulate_qvlm(x, low, high).contiguous()


@simulate_qvlm.register_fake
def _(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return RULE.fake(x, low, high)


OVERLOAD = torch.ops.qpcompile.simulate_qvlm.default
