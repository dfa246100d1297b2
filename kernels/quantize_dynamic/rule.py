"""Operand rules of `qpcompile::quantize_dynamic` and of the operators that end with it."""

from __future__ import annotations

from collections.abc import Mapping

from qpcompile.kernels.quantize_dynamic.reference import BITS
from qpcompile.kernels.rules import Relation, Rule, Scalar, count, grouped, number, one_of


def quantizing(name: str, operands: Mapping[str, str | Scalar], *relations: Relation) -> Rule:
    """The rule of an operator with these operands, over channels C, whose result is quantized."""
    return Rule(
        name,
        {**operands, "group_size": count(), "clip_ratio": number(0, 1, above=True), "bits": one_of(*BITS)},
        relations=(grouped("C"), *relations),
        gives=("i8[..., C]", "f32[..., groups(C, group_size)]"),
        empty="...",
    )


RULE = quantizing("qpcompile::quantize_dynamic", {"x": "f[..., C]"})
