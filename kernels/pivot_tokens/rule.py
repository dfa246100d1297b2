"""Operand rule of `qpcompile::pivot_tokens`."""

from qpcompile.kernels.rules import Relation, Rule, count

MOST_PIVOTS = 256
"""Limit per kind: every pivot is a sequential step, and several more nodes in an ONNX graph."""
RULE = Rule(
    "qpcompile::pivot_tokens",
    {
        "hidden": "f[B, S, C]",
        "keys": "f[B, H, S, D]",
        "visual": "bool[B, S]",
        "valid": "bool[B, S]",
        "budget": "i64[B]",
        "visual_pivots": count(0, MOST_PIVOTS),
        "text_pivots": count(0, MOST_PIVOTS),
    },
    relations=(
        Relation(
            "visual_pivots",
            "there must be a pivot",
            ("visual_pivots", "text_pivots"),
            lambda visual, text: visual + text > 0,
        ),
    ),
    gives=("f32[B, S]",),
)
