"""Operand rule of `qpcompile::fuse_risk`."""

from qpcompile.kernels.rules import FLAG, Rule, number

RULE = Rule(
    "qpcompile::fuse_risk",
    {
        "scores": "f32[B, S]",
        "risk": "f32[B, S]",
        "counted": "bool[B, S]",
        "alpha": number(0, 1),
        "dynamic": FLAG,
        "minmax": FLAG,
    },
    gives=("f32[B, S]",),
)
