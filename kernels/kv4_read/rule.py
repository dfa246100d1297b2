"""Operand rule of `qpcompile::kv4_read`."""

from qpcompile.kernels.rules import FLOAT_TYPE, Rule, count

RULE = Rule(
    "qpcompile::kv4_read",
    {
        "codes": "u8[B, H, S, ceil(head_dim/2)]",
        "affine": "f32[B, H, S, 2]",
        "head_dim": count(1),
        "dtype": FLOAT_TYPE,
    },
    gives=("=dtype[B, H, S, head_dim]",),
    empty="B S",
)
