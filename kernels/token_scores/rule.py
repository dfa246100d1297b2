"""Operand rule of `qpcompile::token_scores`."""

from qpcompile.kernels.quantize_dynamic.reference import BITS
from qpcompile.kernels.rules import FLAG, Relation, Rule, count, grouped, multiple, number, numbers, one_of
from qpcompile.kernels.token_scores.normalize import METHODS

RULE = Rule(
    "qpcompile::token_scores",
    {
        "hidden": "f[B, S, C]",
        "rounded": "f[B, S, D]",
        "q": "f[B, H, S, E]",
        "k": "f[B, Hkv, S, E]",
        "mask": "f|bool[B|1, H|1, S, S]?",
        "scale": number(),
        "visual": "bool[B, S]",
        "valid": "bool[B, S]",
        "queries": "bool[B, S]",
        "weights": numbers(4),
        "normalize": one_of(*METHODS),
        "low": number(0, 100),
        "high": number(0, 100),
        "intra_mean": FLAG,
        "rotate": FLAG,
        "group_size": count(),
        "clip_ratio": number(0, 1, above=True),
        "bits": one_of(*BITS),
        "relative": FLAG,
        "sink": number(0),
    },
    relations=(
        multiple("q", "H", "Hkv"),
        grouped("D"),
        Relation("low", "low must be below high", ("low", "high"), lambda low, high: low < high),
    ),
    gives=("f32[B, S]",),
)
