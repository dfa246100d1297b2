"""Operand rules of `qpcompile::rope_kv4_write` and `qpcompile::rope_kv4_append`."""

from __future__ import annotations

from collections.abc import Mapping

from qpcompile.kernels.rules import FLAG, Relation, Rule


def writing(name: str, past: Mapping[str, str], codes: str, affine: str) -> Rule:
    """The rule of an operator that appends to the operands `past`, and returns codes and scales of these forms."""
    heads = {"q": "f[B, Hq, S, D]", "k": "=q[B, Hkv, S, D]", "v": "=q[B, Hkv, S, D]"}
    tables = {"cos": "f[B|1, 1, S|1, D]?", "sin": "=cos[B|1, 1, S|1, D]?"}
    return Rule(
        name,
        {**heads, **tables, "rotate": FLAG, **past, "center": "f[1, Hkv, 1, D]?"},
        relations=(
            Relation("q", "D must be even", ("D",), lambda size: size % 2 == 0),
            Relation("q", "Hq must be a multiple of Hkv", ("Hq", "Hkv"), lambda of, by: of % by == 0),
            Relation("cos", "cos and sin must be given together", ("cos", "sin"), _together, partial=True),
            Relation("rotate", "without cos and sin, rotate must be True", ("cos", "rotate"), _changes, partial=True),
        ),
        gives=("=q[B, Hq, S, D]", codes, affine, codes, affine),
        empty="B S P",
    )


def _together(cos: object, sin: object) -> bool:
    return (cos is None) == (sin is None)


def _changes(cos: object, rotate: object) -> bool:
    return cos is not None or rotate is True


RULE = writing("qpcompile::rope_kv4_write", {}, "u8[B, Hkv, S, ceil(D/2)]", "f32[B, Hkv, S, 2]")
