"""Operand rule of `qpcompile::activation`."""

from qpcompile.kernels.activation_quantize.reference import FUNCTIONS
from qpcompile.kernels.rules import Rule, one_of

RULE = Rule(
    "qpcompile::activation",
    {"x": "f[..., C]", "up": "=x[..., C]?", "function": one_of(*FUNCTIONS)},
    gives=("=x[..., C]",),
    empty="...",
)
