"""qpcompile::hadamard: online rotation of activations, where it cannot be folded into weights."""

import functools

import torch
from torch import Tensor

from qpcompile.kernels.hadamard import cpu, reference
from qpcompile.kernels.hadamard.rule import RULE


@torch.library.custom_op("qpcompile::hadamard", mutates_args=(), device_types="cpu")
def hadamard(x: Tensor, scale: Tensor | None) -> Tensor:
    """x: f[..., C], scale: f32[C] -> x.dtype[..., C]."""
    return cpu.hadamard(x, scale)


@hadamard.register_kernel("cuda")
def _hadamard_cuda(x: Tensor, scale: Tensor | None) -> Tensor:
    RULE.check(x, scale)
    return hadamard_cuda(x, scale)


@hadamard.register_fake
def _hadamard_fake(x: Tensor, scale: Tensor | None) -> Tensor:
    return RULE.fake(x, scale)


def hadamard_cuda(x: Tensor, scale: Tensor | None) -> Tensor:
    """x: f[..., C] on the GPU, scale: f32[C] -> x.dtype[..., C]; as two torch products if C fits no tile."""
    from qpcompile.kernels.hadamard import triton

    if (tiling := triton.rotated_tiling(x.shape[-1])) is not None:
        return triton.hadamard(x, scale, tiling)
    left, right = _device_factors(x.shape[-1], x.device)
    return reference.rotate(x, scale, left, right)


@functools.cache
def _device_factors(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The factors of `channels` on `device`, copied once: a copy from the host would break CUDA graph capture."""
    with torch.inference_mode(False):
        left, right = reference.factors(channels)
        return left.to(device), right.to(device)


OVERLOAD = torch.ops.qpcompile.hadamard.default
