"""Arguments that the row operators in C have in common."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.reference import factor_arrays
from qpcompile.kernels.quantize_int4.reference import group_count

Factors = tuple[int | None, int | None, int, int]
"""left, right: where two float32 matrices lie, and their sizes A and c; None and 0 where nothing is rotated."""
NO_FACTORS: Factors = (None, None, 0, 0)


def rotation(channels: int, rotate: bool) -> Factors:
    """The factors of the Hadamard rotation of C channels."""
    return _rotation(channels) if rotate else NO_FACTORS


@functools.cache
def _rotation(channels: int) -> Factors:
    left, right = factor_arrays(channels)  # cached there, so that they stay where they are
    return left.ctypes.data, right.ctypes.data, len(left), len(right)


def dense(tensor: Tensor | None) -> Tensor | None:
    """A factor or scale as the C reads it: f32, contiguous. The caller holds it while the call runs."""
    return None if tensor is None else tensor.float().contiguous()


def empty_codes(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes i8[..., C] and scales f32[..., G] of x: f[..., C], to be filled."""
    groups = 1 if group_size == 0 else group_count(x.shape[-1], group_size)
    return torch.empty(x.shape, dtype=torch.int8), torch.empty((*x.shape[:-1], groups))


def row_count(x: Tensor) -> int:
    """How many rows x: f[..., C] has."""
    return x.numel() // x.shape[-1] if x.numel() else 0
