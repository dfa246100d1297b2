"""Operand rule of `qpcompile::expert_linear_a16`."""

from qpcompile.kernels.rules import Rule, multiple

RULE = Rule(
    "qpcompile::expert_linear_a16",
    {
        "x": "f[N, I, K]",
        "weight": ("u8[E, O, ceil(K/2)]", "i8[E, O, K]"),
        "weight_scale": "f32[E, O, Gw]",
        "index": "i[N, J]",
    },
    relations=(multiple("index", "J", "I"), multiple("weight_scale", "K", "Gw")),
    gives=("=x[N, J, O]",),
    empty="N",
)
