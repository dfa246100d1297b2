"""Operand rule of `qpcompile::attention_step`."""

from qpcompile.kernels.quantize_dynamic.reference import BITS
from qpcompile.kernels.rope_kv_write.rule import RELATIONS, cache_forms, writing_operands
from qpcompile.kernels.rules import FLAG, Relation, Rule, count, number, one_of
from qpcompile.kernels.transform_quantize.rule import TOGETHER

RULE = Rule(
    "qpcompile::attention_step",
    {
        **writing_operands(cache_forms("P")),
        "mask": "f|bool[B|1, Hq|1, S, P+S]?",
        "scale": number(),
        "transform_scale": "f32[Hq*D]?",
        "rotate_result": FLAG,
        "left": "f32[A, A]?",
        "right": "f32[c, c]?",
        "shift": "f32[Hq*D]?",
        "group_size": count(),
        "clip_ratio": number(0, 1, above=True),
        "bits": one_of(*BITS),
    },
    relations=(
        *RELATIONS,
        TOGETHER,
        Relation("left", "a rotation takes no factors", ("left", "rotate_result"), lambda _, rotate: not rotate),
        Relation(
            "right",
            "A times c must be Hq times D",
            ("A", "c", "Hq", "D"),
            lambda left, right, heads, size: left * right == heads * size,
        ),
        Relation(
            "group_size",
            "group_size must be 0 or divide Hq times D",
            ("Hq", "D", "group_size"),
            lambda heads, size, group: group == 0 or heads * size % group == 0,
        ),
    ),
    gives=("i8[B, S, Hq*D]", "f32[B, S, groups(Hq*D, group_size)]", *cache_forms("P+S").values()),
    empty="B S P",
)
