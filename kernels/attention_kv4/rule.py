"""Operand rule of `qpcompile::attention_kv4`."""

from qpcompile.kernels.rules import Rule, multiple, number

RULE = Rule(
    "qpcompile::attention_kv4",
    {
        "q": "f[B, Hq, T, D]",
        "k_codes": "u8[B, Hkv, S, ceil(D/2)]",
        "k_affine": "f32[B, Hkv, S, 2]",
        "v_codes": "u8[B, Hkv, S, ceil(D/2)]",
        "v_affine": "f32[B, Hkv, S, 2]",
        "mask": "f|bool[B|1, Hq|1, T, S]?",
        "scale": number(),
        "filled": "i64[1]?",
    },
    relations=(multiple("q", "Hq", "Hkv"),),
    gives=("=q[B, Hq, T, D]",),
    empty="B T",
)
