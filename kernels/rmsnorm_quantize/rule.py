"""What `qpcompile::rmsnorm_quantize` may be given."""

from qpcompile.kernels.rules import FLAG, Rule, count, grouped, number

RULE = Rule(
    "qpcompile::rmsnorm_quantize",
    {
        "x": "f[..., C]",
        "weight": "f[C]",
        "eps": number(0),
        "transform_scale": "f32[C]?",
        "rotate": FLAG,
        "group_size": count(),
        "clip_ratio": number(0, 1, above=True),
    },
    relations=(grouped("C"),),
    gives=(
        "i8[..., C]",
        "f32[..., groups(C, group_size)]",
    ),
    empty="...",
)
