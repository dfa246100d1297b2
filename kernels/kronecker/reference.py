"""Online basis change of the channels by a Kronecker product of two learned matrices, given as tensors.

    x' = (L kron R) (x * scale),   per token reshaped to [A, c]:   x' = L (x * scale) R^T

The operator takes R^T, so that neither product transposes. Cost C (A + c) per token instead of C^2.
Source: FlatQuant: Flatness Matters for LLM Quantization, section 3.2, arXiv 2410.09426.
"""

from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.hadamard.reference import rotate


def kronecker(x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """x: f[..., A*c], scale: f32[A*c], left: f32[A, A], right: f32[c, c] -> x.dtype[..., A*c]."""
    check_factors(x.shape[-1], left, right)
    return rotate(x, scale, left, right)


def check_factors(channels: int, left: Tensor, right: Tensor) -> None:
    """Refuse factors that are not square or do not match the channel count."""
    square = left.dim() == right.dim() == 2 and left.shape[0] == left.shape[1] and right.shape[0] == right.shape[1]
    if not square or left.shape[0] * right.shape[0] != channels:
        raise KernelError(
            f"factors {list(left.shape)} and {list(right.shape)} do not transform {channels} channels",
            where="qpcompile::kronecker",
            do="give two square matrices whose sizes multiply to the channel count",
        )
