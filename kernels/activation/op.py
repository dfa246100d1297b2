"""qpcompile::activation: activation function or gated linear unit in one operator."""

import torch
from torch import Tensor

from qpcompile.kernels.activation import cpu
from qpcompile.kernels.activation.rule import RULE


@torch.library.custom_op("qpcompile::activation", mutates_args=(), device_types="cpu")
def activation(x: Tensor, up: Tensor | None, function: str) -> Tensor:
    """x, up: f[..., C], function: one of activation_quantize's reference.FUNCTIONS -> as x."""
    return cpu.activation(x, up, function)


@activation.register_kernel("cuda")
def _(x: Tensor, up: Tensor | None, function: str) -> Tensor:
    from qpcompile.kernels.transform_quantize.triton import Rows, rows_stored

    RULE.check(x, up, function)
    return rows_stored(Rows(function, x, up))


@activation.register_fake
def _(x: Tensor, up: Tensor | None, function: str) -> Tensor:
    return RULE.fake(x, up, function)


OVERLOAD = torch.ops.qpcompile.activation.default
