"""Operand rule of `qpcompile::rmsnorm`."""

from qpcompile.kernels.rules import Rule, number

RULE = Rule(
    "qpcompile::rmsnorm",
    {
        "x": "f[..., C]",
        "weight": "f[C]",
        "eps": number(0),
    },
    gives=("=x+weight[..., C]",),
    empty="...",
)
