"""Operand rules of `qpcompile::transform_quantize` and of the operators with its epilogue."""

from __future__ import annotations

from collections.abc import Mapping

from qpcompile.kernels.quantize_dynamic.rule import quantizing
from qpcompile.kernels.rules import FLAG, Relation, Rule, Scalar


def transforming(name: str, operands: Mapping[str, str | Scalar]) -> Rule:
    """The rule of an operator with these operands, over channels C, whose result is transformed and quantized."""
    transform: dict[str, str | Scalar] = {"transform_scale": "f32[C]?", "rotate": FLAG}
    transform |= {"left": "f32[A, A]?", "right": "f32[c, c]?", "shift": "f32[C]?"}
    return quantizing(
        name,
        {**operands, **transform},
        Relation("right", "A times c must be C", ("A", "c", "C"), lambda left, right, size: left * right == size),
        Relation("left", "a rotation takes no factors", ("left", "rotate"), lambda _, rotate: not rotate),
        TOGETHER,
    )


def _together(left: object, right: object) -> bool:
    return (left is None) == (right is None)


TOGETHER = Relation("left", "left and right must be given together", ("left", "right"), _together, partial=True)
RULE = transforming("qpcompile::transform_quantize", {"x": "f[..., C]"})
