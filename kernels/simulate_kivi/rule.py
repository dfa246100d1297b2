"""Operand rule of `qpcompile::simulate_kivi`."""

from qpcompile.kernels.rules import FLAG, Rule, count

RULE = Rule(
    "qpcompile::simulate_kivi",
    {
        "x": "f[B, H, S, D]",
        "levels": count(1),
        "key": FLAG,
    },
    gives=("=x[B, H, S, D]",),
    empty="B S",
)
