"""The trainable parameters at one linear input: two factors of a basis change, and a clip ratio.

    x' = (L kron R) x        W' = W (L kron R)^-1        scale of x' = sigmoid(c) max|x'| / h

rotation     L, R orthogonal: Cayley's (I - S)(I + S)^-1 of a skew-symmetric S, so that every step stays a rotation
flatquant    L, R free; initialized at the minimum of  tr(M Sigma) tr(M^-1 W^T W),  M = (L kron R)^T (L kron R), which
             is the noise of rounding an outlier-free x', and inverted directly

Both are initialized on top of the existing Hadamard rotation. Rounding uses the straight-through estimator.

Sources: "FlatQuant" (arXiv 2410.09426), section 3; "SpinQuant" (arXiv 2405.16406), section 3.2; the initialization is
ours: for one factor the minimum is the geometric mean of Sigma^-1 and W^T W.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from qpcompile.calibration.statistics import InputStatistics
from qpcompile.kernels.quantize_dynamic.reference import code_range, highest
from qpcompile.quantization.basis_change import WIDE
from qpcompile.quantization.block_sums import BlockSums
from qpcompile.recipe.quantize import ActivationScheme

SWEEPS = 5
# Regularization: this share of the mean eigenvalue is added to every eigenvalue.
FLOOR = 1e-3


class LearnedTransform(nn.Module):
    """Factors of sizes A and c, initially the identity; rotations, or free. `clip`: the initial ratio, < 1."""

    def __init__(self, rotation: bool, left: int, right: int, clip: float) -> None:
        super().__init__()
        self.rotation = rotation
        fill = torch.zeros if rotation else _eye
        self.left, self.right = nn.Parameter(fill(left, left)), nn.Parameter(fill(right, right))
        self.clip = nn.Parameter(torch.tensor(math.log(clip / (1 - clip))))

    def begin(self, second: BlockSums, gram: BlockSums) -> None:
        """Initialize free factors from sums of second: f[C, C], x x^T, and gram: f[C, C], W^T W, of any scale."""
        left, right = balanced_factors(second, gram)
        with torch.no_grad():
            self.left.copy_(left)
            self.right.copy_(right)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L: f32[A, A] and R: f32[c, c]."""
        if self.rotation:
            return cayley(self.left), cayley(self.right)
        return self.left, self.right

    def inputs(self, x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
        """x: f[..., C] -> f32[..., C], transformed and fake-quantized."""
        left, right = self.factors()
        return rounded(kronecker_rows(x, left, right), scheme.kernel_group, torch.sigmoid(self.clip), scheme.bits)

    def weights(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: f[..., C] -> W (L kron R)^-1: f32[..., C]."""
        left, right = self.factors()
        return kronecker_rows(weight, torch.linalg.inv(left).T, torch.linalg.inv(right).T)


def kronecker_rows(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(left kron right) applied to every row. x: f[..., A*c], left: f[A, A], right: f[c, c] -> f[..., A*c]."""
    blocks = x.to(left.dtype).reshape(-1, left.shape[0], right.shape[0])
    return (left @ (blocks @ right.T)).reshape(x.shape)


def rounded(x: torch.Tensor, group_size: int, clip: torch.Tensor | float, bits: int) -> torch.Tensor:
    """x: f[..., C] fake-quantized, one scale per row or group of a row, with straight-through gradients."""
    groups = x.unflatten(-1, (-1, group_size)) if group_size else x.unsqueeze(-2)
    scale = (groups.abs().amax(dim=-1, keepdim=True) * clip / highest(bits)).clamp(min=1e-12)
    ratio = groups / scale
    codes = (ratio + (ratio.round() - ratio).detach()).clamp(*code_range(bits))
    return (codes * scale).flatten(-2)


def cayley(free: torch.Tensor) -> torch.Tensor:
    """The rotation parameterized by the upper triangle of f[n, n]."""
    skew = free.triu(1) - free.triu(1).T
    eye = _eye(*free.shape).to(free)
    return torch.linalg.solve(eye + skew, eye - skew)


def balanced_factors(second: BlockSums, gram: BlockSums) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric L: f32[A, A] and R: f32[c, c] of the module's docstring, by alternating minimization."""
    second, gram = second.lifted(FLOOR), gram.lifted(FLOOR)
    first, last = (torch.eye(size, dtype=torch.float64) for size in second.sizes)
    for _ in range(SWEEPS):
        first = _geometric(second.left(last), gram.left(torch.linalg.inv(last)))
        last = _geometric(second.right(first), gram.right(torch.linalg.inv(first)))
    return _power(first, 0.5).float(), _power(last, 0.5).float()


def _geometric(second: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The geometric mean of second^-1 and gram, with mean diagonal 1."""
    root, inverse = _power(second, 0.5), _power(second, -0.5)
    mean = inverse @ _power(root @ gram @ root, 0.5) @ inverse
    return mean * len(mean) / mean.trace()


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=1e-12 * float(values[-1])).pow(exponent)) @ vectors.T


def _eye(rows: int, columns: int) -> torch.Tensor:
    return torch.eye(rows, columns)


def carried(found: InputStatistics, left: torch.Tensor, right: torch.Tensor) -> InputStatistics:
    """Statistics after left kron right; applied by factors if the input is wide."""
    if len(left) * len(right) > WIDE:
        return found.turned(lambda rows: kronecker_rows(rows, left, right))
    return found.transformed(torch.kron(left, right))
