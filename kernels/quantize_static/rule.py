"""Operand rule of `qpcompile::quantize_static`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::quantize_static",
    {
        "x": "f[..., C]",
        "scale": ("f32[1]", "f32[..., 1]"),
    },
    gives=(
        "i8[..., C]",
        "f32[..., 1]",
    ),
    empty="...",
)
