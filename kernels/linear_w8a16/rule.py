"""Operand rule of `qpcompile::linear_w8a16`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::linear_w8a16",
    {
        "x": "f[..., K]",
        "weight": "i8[N, K]",
        "weight_scale": "f32[N, 1]",
        "bias": "f[N]?",
    },
    gives=("=x[..., N]",),
    empty="...",
)
