"""Operand rule of `qpcompile::simulate_qvlm`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::simulate_qvlm",
    {
        "x": "f[..., C]",
        "low": "f32[C]",
        "high": "f32[C]",
    },
    gives=("=x[..., C]",),
    empty="...",
)
