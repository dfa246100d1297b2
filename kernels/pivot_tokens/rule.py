"""What `qpcompile::pivot_tokens` may be given."""

from qpcompile.kernels.rules import Relation, Rule, count

RULE = Rule(
    "qpcompile::pivot_tokens",
    {
        "hidden": "f[B, S, C]",
        "keys": "f[B, H, S, D]",
        "visual": "bool[B, S]",
        "valid": "bool[B, S]",
        "budget": "i64[B]",
        "visual_pivots": count(),
        "text_pivots": count(),
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
