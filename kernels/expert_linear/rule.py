"""Operand rule of `qpcompile::expert_linear`."""

from qpcompile.kernels.rules import Rule, multiple

RULE = Rule(
    "qpcompile::expert_linear",
    {"x": "f[N, I, C]", "weight": "=x[E, O, C]", "index": "i[N, J]"},
    relations=(multiple("index", "J", "I"),),
    gives=("=x[N, J, O]",),
    empty="N",
)
