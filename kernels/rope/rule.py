"""Operand rule of `qpcompile::rope`."""

from qpcompile.kernels.rules import Relation, Rule

RULE = Rule(
    "qpcompile::rope",
    {
        "x": "f[..., D]",
        "cos": "f[~..., D]",
        "sin": "=cos[~..., D]",
    },
    relations=(Relation("x", "D must be even", ("D",), lambda size: size % 2 == 0),),
    gives=("=x[..., D]",),
    empty="...",
)
