"""Operand rule of `qpcompile::kv8_read`."""

from qpcompile.kernels.rules import FLOAT_TYPE, Rule

RULE = Rule(
    "qpcompile::kv8_read",
    {
        "codes": "u8[B, H, S, D]",
        "affine": "f32[B, H, S, 2]",
        "dtype": FLOAT_TYPE,
    },
    gives=("=dtype[B, H, S, D]",),
    empty="B S",
)
