"""Operand rule of `qpcompile::quantize_static`."""

from qpcompile.kernels.quantize_dynamic.reference import BITS
from qpcompile.kernels.rules import Rule, one_of

RULE = Rule(
    "qpcompile::quantize_static",
    {
        "x": "f[..., C]",
        "scale": ("f32[1]", "f32[..., 1]"),
        "bits": one_of(*BITS),
    },
    gives=(
        "i8[..., C]",
        "f32[..., 1]",
    ),
    empty="...",
)
