"""Operand rule of `qpcompile::kv_read`."""

from qpcompile.kernels.kv_write.reference import BITS
from qpcompile.kernels.rules import FLOAT_TYPE, Rule, count, one_of

RULE = Rule(
    "qpcompile::kv_read",
    {
        "codes": "u8[B, H, S, bytes(head_dim, bits)]",
        "affine": "f32[B, H, S, 2]",
        "head_dim": count(1),
        "bits": one_of(*BITS),
        "dtype": FLOAT_TYPE,
    },
    gives=("=dtype[B, H, S, head_dim]",),
    empty="B S",
)
