"""Operand rule of `qpcompile::linear_w4a16`."""

from qpcompile.kernels.rules import Rule, multiple

RULE = Rule(
    "qpcompile::linear_w4a16",
    {
        "x": "f[..., K]",
        "weight": "u8[N, ceil(K/2)]",
        "weight_scale": "f32[N, Gw]",
        "bias": "f[N]?",
    },
    relations=(multiple("weight_scale", "K", "Gw"),),
    gives=("=x[..., N]",),
    empty="...",
)
