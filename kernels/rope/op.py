"""`qpcompile::rope`: one node for what transformers spells in seven."""

import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.rope import cpu


@torch.library.custom_op("qpcompile::rope", mutates_args=(), device_types="cpu")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: f[..., D], D even; cos, sin: f[..., D], broadcast to x -> x.dtype[..., D]."""
    _check(x, cos, sin)
    return cpu.rope(x, cos, sin)


@rope.register_kernel("cuda")
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from qpcompile.kernels.rope import triton

    _check(x, cos, sin)
    return triton.rope(x, cos, sin)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check(x, cos, sin)
    return x.new_empty(x.shape)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    size = x.shape[-1] if x.dim() else 0
    sizes = [each.shape[-1] if each.dim() else 0 for each in (cos, sin)]
    if not x.is_floating_point() or not size or size % 2 or sizes != [size, size] or cos.dtype != sin.dtype:
        raise KernelError(
            f"rope got {x.dtype}{list(x.shape)} with {cos.dtype}{list(cos.shape)} and {sin.dtype}{list(sin.shape)}",
            where="qpcompile::rope",
            do="give floating-point heads of an even size, and a cosine and a sine of one type for each number of it",
        )


OVERLOAD = torch.ops.qpcompile.rope.default
