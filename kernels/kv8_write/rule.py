"""Operand rule of `qpcompile::kv8_write`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::kv8_write",
    {
        "x": "f[B, H, S, D]",
    },
    gives=(
        "u8[B, H, S, D]",
        "f32[B, H, S, 2]",
    ),
    empty="B S",
)
