"""Online orthogonal rotation of the channels, for any channel count, to spread outliers before quantization.

    x' = (x * scale) T^T,   T = H_{2^k} kron D_m,   C = 2^k m with m odd

H is Sylvester's Hadamard matrix divided by sqrt(2^k), D_m the orthonormal DCT-II of order m (1 for m = 1).
T is never materialized: with C = A c it is H_A kron R, so a token reshaped to [A, c] becomes H_A (x R^T). The products
per token do not depend on the batch, and the cost falls from C^2 to C (A + c).
Source: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, section 3, arXiv 2404.00456; the DCT for the odd factor
replaces its table of known Hadamard matrices, so that every width is supported.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.sums import wide_type

MOST_COLUMNS = 1 << 14
"""Largest side of the factor that contains the DCT, which takes gigabytes there."""


def hadamard(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x: f[..., C], scale: f32[C] -> x.dtype[..., C], accumulated in `wide_type` and rounded to float32 once."""
    left, right = factors(x.shape[-1])
    return rotate(x, scale, left.to(x.device), right.to(x.device))


def rotate(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype | None = None) -> Tensor:
    """x: f[..., A*c], left: f32[A, A], right: f32[c, c] -> x.dtype[..., A*c], left @ x[A, c] @ right per token.

    wide: the accumulation type, if x was computed from a tensor of another type.
    """
    wide = wide or wide_type(x)
    values = x.float() if scale is None else x.float() * scale
    blocks = values.to(wide).reshape(-1, left.shape[0], right.shape[0])
    return (left.to(wide) @ (blocks @ right.to(wide))).reshape(x.shape).float().to(x.dtype)


def factors(channels: int) -> tuple[Tensor, Tensor]:
    """The two factors for `rotate`: f32[A, A] of +-1, and f32[c, c] that contains the DCT and the normalization."""
    left, right = factor_arrays(channels)
    return torch.from_numpy(left), torch.from_numpy(right)


# Cached as arrays and not as tensors: a tensor created under a fake or inference mode must not be cached.
@functools.cache
def factor_arrays(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (unnormalized H_A, normalized R^T), A the power of two that minimizes A + c."""
    left, right = _wide_arrays(channels)
    return left.astype(np.float32), np.ascontiguousarray(right.T).astype(np.float32)


def factors_f64(channels: int) -> tuple[Tensor, Tensor]:
    """`factors` in float64."""
    left, right = _wide_arrays(channels)
    return torch.from_numpy(left), torch.from_numpy(np.ascontiguousarray(right.T))


def _wide_arrays(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 (unnormalized H_A, normalized R)."""
    power, odd = split_channels(channels)
    sides = (1 << i for i in range(power.bit_length()))
    side = min(sides, key=lambda a: a + channels // a)
    if channels // side > MOST_COLUMNS:
        raise KernelError(
            f"a rotation of {channels} channels is a product with a matrix of {channels // side} columns",
            where="qpcompile::hadamard",
            do=f"leave these channels as they are: {MOST_COLUMNS} columns are the most",
        )
    return sylvester(side), np.kron(sylvester(power // side), dct_matrix(odd)) / np.sqrt(power)


def hadamard_matrix(channels: int) -> Tensor:
    """T: f64[C, C], orthogonal, materialized from its definition."""
    power, odd = split_channels(channels)
    return torch.from_numpy(np.kron(sylvester(power) / np.sqrt(power), dct_matrix(odd)))


def split_channels(channels: int) -> tuple[int, int]:
    """C -> (2^k, m) with C = 2^k m and m odd."""
    if channels < 1:
        raise KernelError(f"a rotation of {channels} channels does not exist", where="qpcompile::hadamard")
    power = channels & -channels
    return power, channels // power


def sylvester(order: int) -> np.ndarray:
    """f64[order, order] of +-1, symmetric; `order` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron([[1.0, 1.0], [1.0, -1.0]], matrix)
    return matrix


def dct_matrix(order: int) -> np.ndarray:
    """f64[order, order], orthonormal DCT-II: row j is the cosine of frequency j."""
    frequency, position = np.indices((order, order))
    matrix = np.sqrt(2.0 / order) * np.cos(np.pi * (2 * position + 1) * frequency / (2 * order))
    matrix[0] = np.sqrt(1.0 / order)
    return matrix
