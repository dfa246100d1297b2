"""Online transform of a linear's input, then quantization; also the epilogue of operators that compute the input.

    y = T (x * transform_scale) - shift;   (q, scale) = quantize_dynamic(y)

T is the identity, the Hadamard rotation (`rotate`), or a learned Kronecker product (`left`, `right`). Values are
rounded to float32 after the transform, and after the shift.
Source: FlatQuant: Flatness Matters for LLM Quantization, section 3.2, arXiv 2410.09426; the shift is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpcompile.kernels.hadamard.reference import factors, rotate
from qpcompile.kernels.kronecker.reference import check_factors
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.kernels.sums import wide_type

SCHEMA = (
    "Tensor? transform_scale, bool rotate, Tensor? left, Tensor? right, Tensor? shift, "
    "int group_size, float clip_ratio, int bits) -> (Tensor, Tensor)"
)
"""The end of the schema of every operator with this epilogue."""
EpilogueArguments = tuple[Tensor | None, bool, Tensor | None, Tensor | None, Tensor | None, int, float, int]
"""The fields of an `Epilogue`, in order."""


@dataclass(frozen=True, eq=False)
class Epilogue:
    """A transform and a quantizer, by the operators' last eight arguments.

    transform_scale, shift: f32[C]; left: f32[A, A], right: f32[c, c] with A c = C; group_size 0: one scale per token.
    """

    transform_scale: Tensor | None = None
    rotate: bool = False
    left: Tensor | None = None
    right: Tensor | None = None
    shift: Tensor | None = None
    group_size: int = 0
    clip_ratio: float = 1.0
    bits: int = 4

    def transformed(self, x: Tensor, wide: torch.dtype | None = None) -> Tensor:
        """x: f32[..., C] -> f32[..., C]; wide: the accumulation type, if x was computed from another type's tensor."""
        if (found := self.factors(x)) is not None:
            y = rotate(x, self.transform_scale, *found, wide)
        else:
            y = x if self.transform_scale is None else x * self.transform_scale
        return y if self.shift is None else y - self.shift

    def quantized(self, x: Tensor, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """x: f32[..., C] -> q: i8[..., C], scale: f32[..., G]."""
        return quantize_dynamic(self.transformed(x, wide), self.group_size, self.clip_ratio, self.bits)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The factors of T for the channels of x, on its device; None for the identity."""
        if self.left is not None and self.right is not None:
            check_factors(x.shape[-1], self.left, self.right)
            return self.left, self.right
        if not self.rotate:
            return None
        left, right = factors(x.shape[-1])
        return left.to(x.device), right.to(x.device)


def transform_quantize(x: Tensor, *epilogue: *EpilogueArguments) -> tuple[Tensor, Tensor]:
    """x: f[..., C] -> q: i8[..., C], scale: f32[..., G]."""
    return Epilogue(*epilogue).quantized(x.float(), wide_type(x))
