"""Operand rule of `qpcompile::text_relevance`."""

from qpcompile.kernels.rules import Rule, one_of

RULE = Rule(
    "qpcompile::text_relevance",
    {
        "hidden": "f[B, S, C]",
        "visual": "bool[B, S]",
        "valid": "bool[B, S]",
        "sign": one_of(1, -1),
    },
    gives=("f32[B, S]",),
)
