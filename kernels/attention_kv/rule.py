"""Operand rule of `qpcompile::attention_kv`."""

from qpcompile.kernels.kv_write.reference import BITS
from qpcompile.kernels.rules import Rule, multiple, number, one_of

RULE = Rule(
    "qpcompile::attention_kv",
    {
        "q": "f[B, Hq, T, D]",
        "k_codes": "u8[B, Hkv, S, bytes(D, k_bits)]",
        "k_affine": "f32[B, Hkv, S, 2]",
        "v_codes": "u8[B, Hkv, S, bytes(D, v_bits)]",
        "v_affine": "f32[B, Hkv, S, 2]",
        "mask": "f|bool[B|1, Hq|1, T, S]?",
        "scale": number(),
        "k_bits": one_of(*BITS),
        "v_bits": one_of(*BITS),
        "filled": "i64[1]?",
    },
    relations=(multiple("q", "Hq", "Hkv"),),
    gives=("=q[B, Hq, T, D]",),
    empty="B T",
)
