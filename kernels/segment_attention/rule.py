"""Operand rule of `qpcompile::segment_attention`."""

from qpcompile.kernels.rules import Rule, multiple, number

RULE = Rule(
    "qpcompile::segment_attention",
    {
        "q": "f[1, Hq, T, D]",
        "k": "=q[1, Hkv, T, D]",
        "v": "=q[1, Hkv, T, Dv]",
        "cu_seqlens": "i[P]",
        "scale": number(),
    },
    relations=(multiple("q", "Hq", "Hkv"),),
    gives=("=q[1, Hq, T, Dv]",),
    empty="T",
)
