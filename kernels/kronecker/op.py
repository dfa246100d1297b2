"""qpcompile::kronecker: a learned online basis change."""

import torch
from torch import Tensor

from qpcompile.kernels.kronecker import cpu
from qpcompile.kernels.kronecker.rule import RULE


@torch.library.custom_op("qpcompile::kronecker", mutates_args=(), device_types="cpu")
def kronecker(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x: f[..., A*c], scale: f32[A*c], left: f32[A, A], right: f32[c, c] -> x.dtype[..., A*c]."""
    return cpu.kronecker(x, scale, left, right)


@kronecker.register_kernel("cuda")
def _kronecker_cuda(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    from qpcompile.kernels.kronecker import triton

    RULE.check(x, scale, left, right)
    return triton.kronecker(x, scale, left, right)


@kronecker.register_fake
def _kronecker_fake(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return RULE.fake(x, scale, left, right)


OVERLOAD = torch.ops.qpcompile.kronecker.default
