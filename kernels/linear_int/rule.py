"""Operand rule of `qpcompile::linear_int`."""

from qpcompile.kernels.quantize_dynamic.reference import BITS
from qpcompile.kernels.rules import FLOAT_TYPE, Relation, Rule, multiple, one_of

GROUPS = Relation(
    "weight_scale",
    "G and Gw must be equal, or one of them 1",
    ("G", "Gw"),
    lambda ours, theirs: ours == theirs or 1 in (ours, theirs),
)
"""Groups of inputs and of weights, of operators on both."""
RULE = Rule(
    "qpcompile::linear_int",
    {
        "q": "i8[..., K]",
        "scale": "f32[..., G]",
        "weight": ("u8[N, ceil(K/2)]", "i8[N, K]"),
        "weight_scale": "f32[N, Gw]",
        "bias": "f[N]?",
        "dtype": FLOAT_TYPE,
        "bits": one_of(*BITS),
        "residual": "=dtype[..., N]?",
    },
    relations=(
        multiple("scale", "K", "G"),
        multiple("weight_scale", "K", "Gw"),
        GROUPS,
    ),
    gives=("=dtype[..., N]",),
    empty="...",
)
