"""Operand rule of `qpcompile::hadamard`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::hadamard",
    {
        "x": "f[..., C]",
        "scale": "f32[C]?",
    },
    gives=("=x[..., C]",),
    empty="...",
)
