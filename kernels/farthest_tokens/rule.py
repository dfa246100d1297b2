"""Operand rule of `qpcompile::farthest_tokens`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::farthest_tokens",
    {
        "features": "f[B, S, C]",
        "counted": "bool[B, S]",
        "budget": "i64[B]",
    },
    gives=("f32[B, S]",),
)
