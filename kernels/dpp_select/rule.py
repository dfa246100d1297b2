"""Operand rule of `qpcompile::dpp_select`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::dpp_select",
    {
        "features": "f[B, S, C]",
        "relevance": "f32[B, S]",
        "counted": "bool[B, S]",
        "budget": "i64[B]",
    },
    gives=("f32[B, S]",),
)
