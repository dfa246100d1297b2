"""Operand rule of `qpcompile::channel_delta`."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::channel_delta",
    {
        "q": "f[B, S, H, D]",
        "k": "=q[B, S, H, D]",
        "v": "=q[B, S, H, E]",
        "decay": "f[B, S, H, D]",
        "beta": "f[B, S, H]",
        "state": "f32[B, H, D, E]",
    },
    gives=("=q[B, S, H, E]", "f32[B, H, D, E]"),
    empty="S",
)
