"""Operand rule of `qpcompile::kv_write`."""

from qpcompile.kernels.kv_write.reference import BITS
from qpcompile.kernels.rules import Rule, one_of

RULE = Rule(
    "qpcompile::kv_write",
    {
        "x": "f[B, H, S, D]",
        "bits": one_of(*BITS),
    },
    gives=(
        "u8[B, H, S, bytes(D, bits)]",
        "f32[B, H, S, 2]",
    ),
    empty="B S",
)
