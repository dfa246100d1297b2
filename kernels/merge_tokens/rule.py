"""Operand rule of `qpcompile::merge_tokens`."""

from qpcompile.kernels.rules import Rule, count

RULE = Rule(
    "qpcompile::merge_tokens",
    {
        "hidden": "f[B, S, C]",
        "keys": "f[B, S, K]",
        "weights": "f32[B, S]",
        "targets": "bool[B, S]",
        "sources": "bool[B, S]",
        "nearest": count(),
    },
    gives=("=hidden[B, S, C]",),
)
