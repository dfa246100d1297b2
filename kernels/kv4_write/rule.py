"""Operand rule of `qpcompile::kv4_write`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::kv4_write",
    {
        "x": "f[B, H, S, D]",
    },
    gives=(
        "u8[B, H, S, ceil(D/2)]",
        "f32[B, H, S, 2]",
    ),
    empty="B S",
)
