"""`qpcompile::rope`: rotary position embedding, one node for seven in transformers' traces."""

import torch
from torch import Tensor

from qpcompile.kernels.rope import cpu
from qpcompile.kernels.rope.rule import RULE


@torch.library.custom_op("qpcompile::rope", mutates_args=(), device_types="cpu")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: f[..., D], D even; cos, sin: f[..., D], broadcast to x -> x.dtype[..., D]."""
    return cpu.rope(x, cos, sin)


@rope.register_kernel("cuda")
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from qpcompile.kernels.rope import triton

    RULE.check(x, cos, sin)
    return triton.rope(x, cos, sin)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return RULE.fake(x, cos, sin)


OVERLOAD = torch.ops.qpcompile.rope.default
