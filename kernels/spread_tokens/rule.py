"""Operand rule of `qpcompile::spread_tokens`."""

from qpcompile.kernels.rules import Rule, number

RULE = Rule(
    "qpcompile::spread_tokens",
    {
        "scores": "f32[B, S]",
        "counted": "bool[B, S]",
        "budget": "i64[B]",
        "share": number(0, 1),
    },
    gives=("f32[B, S]",),
)
