"""Operand rules of `qpcompile::rope_kv_write` and `qpcompile::rope_kv_append`."""

from __future__ import annotations

from collections.abc import Mapping

from qpcompile.kernels.kv_write.reference import BITS
from qpcompile.kernels.rules import FLAG, Relation, Rule, Scalar, one_of


def writing(name: str, past: Mapping[str, str], tokens: str) -> Rule:
    """The rule of an operator that appends to the operands `past`, and returns a cache of `tokens`."""
    gives = ("=q[B, Hq, S, D]", *cache_forms(tokens).values())
    return Rule(name, writing_operands(past), relations=RELATIONS, gives=gives, empty="B S P")


def writing_operands(past: Mapping[str, str]) -> dict[str, str | Scalar]:
    """The operands of such an operator, in order."""
    heads = {"q": "f[B, Hq, S, D]", "k": "=q[B, Hkv, S, D]", "v": "=q[B, Hkv, S, D]"}
    tables = {"cos": "f[B|1, 1, S|1, D]?", "sin": "=cos[B|1, 1, S|1, D]?"}
    settings = {"rotate": FLAG, "k_bits": one_of(*BITS), "v_bits": one_of(*BITS)}
    return {**heads, **tables, **settings, **past, "center": "f[1, Hkv, 1, D]?"}


def cache_forms(tokens: str) -> dict[str, str]:
    """The forms of the parts of a cache of so many tokens, by their names."""
    affine = f"f32[B, Hkv, {tokens}, 2]"
    keys, values = (f"u8[B, Hkv, {tokens}, bytes(D, {bits})]" for bits in ("k_bits", "v_bits"))
    return {"k_codes": keys, "k_affine": affine, "v_codes": values, "v_affine": affine}


def _together(cos: object, sin: object) -> bool:
    return (cos is None) == (sin is None)


def _changes(cos: object, rotate: object) -> bool:
    return cos is not None or rotate is True


RELATIONS = (
    Relation("q", "D must be even", ("D",), lambda size: size % 2 == 0),
    Relation("q", "Hq must be a multiple of Hkv", ("Hq", "Hkv"), lambda of, by: of % by == 0),
    Relation("cos", "cos and sin must be given together", ("cos", "sin"), _together, partial=True),
    Relation("rotate", "without cos and sin, rotate must be True", ("cos", "rotate"), _changes, partial=True),
)
RULE = writing("qpcompile::rope_kv_write", {}, "S")
