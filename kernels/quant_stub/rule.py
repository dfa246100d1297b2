"""Operand rule of `qpcompile::quant_stub`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::quant_stub",
    {
        "x": "f[...]",
    },
    gives=("=x[...]",),
    empty="...",
)
