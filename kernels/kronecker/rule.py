"""Operand rule of `qpcompile::kronecker`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::kronecker",
    {
        "x": "f[..., A*c]",
        "scale": "f32[A*c]?",
        "left": "f32[A, A]",
        "right": "f32[c, c]",
    },
    gives=("=x[..., A*c]",),
    empty="...",
)
