"""What `qpcompile::quantize_int4` may be given."""

from qpcompile.kernels.rules import Rule, count, grouped, number

RULE = Rule(
    "qpcompile::quantize_int4",
    {
        "x": "f[..., C]",
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
