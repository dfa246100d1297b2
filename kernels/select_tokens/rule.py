"""Operand rule of `qpcompile::select_tokens`."""

from qpcompile.kernels.rules import Relation, Rule, count

RULE = Rule(
    "qpcompile::select_tokens",
    {
        "scores": "f32[B, S]",
        "keep": count(),
        "quota": "i64[B]",
    },
    relations=(
        Relation(
            "keep",
            "keep must be at most S, and counted from the same input",
            ("keep", "S"),
            lambda keep, size: keep <= size,
        ),
    ),
    gives=(
        "i64[B, keep]",
        "bool[B, keep]",
    ),
)
