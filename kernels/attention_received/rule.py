"""Operand rule of `qpcompile::attention_received`."""

from qpcompile.kernels.rules import FLAG, Relation, Rule, multiple, number

RULE = Rule(
    "qpcompile::attention_received",
    {
        "q": "f[B, Hq, T, D]",
        "k": "f[B, Hkv, T, D]",
        "cu_seqlens": "i[P]?",
        "scale": number(),
        "class_token": FLAG,
    },
    relations=(
        multiple("q", "Hq", "Hkv"),
        Relation(
            "cu_seqlens",
            "segments are of one packed row, B = 1, without a class token",
            ("P", "B", "class_token"),
            lambda _, rows, class_token: rows == 1 and not class_token,
        ),
    ),
    gives=("f32[B, T]",),
)
