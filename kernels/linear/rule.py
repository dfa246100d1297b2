"""Operand rule of `aten::linear`: torch would broadcast an operand that is too short."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "aten::linear",
    {
        "input": "f[..., K]",
        "weight": "=input[N, K]",
        "bias": "=input[N]?",
    },
    gives=("=input[..., N]",),
    empty="...",
)
