"""qpcompile::simulate_qvlm, a simulation in floating point on every device. It has no ONNX form."""

import torch
from torch import Tensor

from qpcompile.kernels.simulate_qvlm import reference


@torch.library.custom_op("qpcompile::simulate_qvlm", mutates_args=())
def simulate_qvlm(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x: f[..., C], low and high: f32[C] -> x.dtype[..., C]."""
    return reference.simulate_qvlm(x, low, high)


@simulate_qvlm.register_fake
def _(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return x.new_empty(x.shape)


OVERLOAD = torch.ops.qpcompile.simulate_qvlm.default
