"""Operand rule of `qpcompile::quantization_risk`."""

from qpcompile.kernels.quantization_risk.reference import METRICS
from qpcompile.kernels.rules import Rule, count, one_of

RULE = Rule(
    "qpcompile::quantization_risk",
    {
        "features": "f[B, S, C]",
        "counted": "bool[B, S]",
        "metric": one_of(*METRICS),
        "group_size": count(1),
    },
    gives=("f32[B, S]",),
)
