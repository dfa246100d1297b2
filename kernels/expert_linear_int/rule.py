"""Operand rule of `qpcompile::expert_linear_int`."""

from qpcompile.kernels.linear_int.rule import GROUPS
from qpcompile.kernels.quantize_dynamic.reference import BITS
from qpcompile.kernels.rules import FLOAT_TYPE, Rule, multiple, one_of

RULE = Rule(
    "qpcompile::expert_linear_int",
    {
        "q": "i8[N, I, K]",
        "scale": "f32[N, I, G]",
        "weight": ("u8[E, O, ceil(K/2)]", "i8[E, O, K]"),
        "weight_scale": "f32[E, O, Gw]",
        "index": "i[N, J]",
        "dtype": FLOAT_TYPE,
        "bits": one_of(*BITS),
    },
    relations=(
        multiple("index", "J", "I"),
        multiple("scale", "K", "G"),
        multiple("weight_scale", "K", "Gw"),
        GROUPS,
    ),
    gives=("=dtype[N, J, O]",),
    empty="N",
)
