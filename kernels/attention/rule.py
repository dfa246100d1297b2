"""Operand rules of attention over whole prompts: by heads here, and in general as `aten::scaled_dot_product_attention`.

torch checks the operands of its own operator except the numbers of heads: it divides by them, and with zero heads the
process dies.
"""

from typing import Any

import torch

from qpcompile.kernels.rules import Relation, Rule, Scalar, multiple, number

RULE = Rule(
    "kernels/attention",
    {
        "q": "f[B, Hq, T, D]",
        "k": "=q[B, Hkv, S, D]",
        "v": "=q[B, Hkv, S, Dv]",
        "mask": ("f|bool[B|1, Hq|1, T|1, S|1]?", "f|bool[Hq|1, T|1, S|1]", "f|bool[T|1, S|1]"),
        "scale": number(),
    },
    relations=(
        multiple("q", "Hq", "Hkv"),
        Relation(
            "mask",
            "a mask must be of bool, f32 or the type of q",
            ("mask", "q"),
            lambda mask, q: mask in (torch.bool, torch.float32, q),
        ),
    ),
    gives=("=q[B, Hq, T, Dv]",),
    empty="B T S",
)


def _left_out_or(scalar: Scalar) -> Scalar:
    return Scalar(f"{scalar.text}, or left out", lambda value: value is None or scalar.accepts(value))


def _divides(grouped: Any, all_heads: int, heads: int) -> bool:
    return not grouped or all_heads % heads == 0


_FLAG = Scalar("True or False, or left out", lambda value: value is None or isinstance(value, bool))
_HEADS = "with enable_gqa, heads of keys and values must divide those of queries"
TORCH_RULE = Rule(
    "aten::scaled_dot_product_attention",
    {
        "query": ("f[*..., Hq, T, D]", "f[T, D]"),
        "key": ("=query[*..., Hk, S, D]", "=query[S, D]"),
        "value": ("=query[*..., Hv, S, Dv]", "=query[S, Dv]"),
        "attn_mask": "f|bool[*...]?",
        "dropout_p": _left_out_or(number(0, 1)),
        "is_causal": _FLAG,
        "scale": _left_out_or(number()),
        "enable_gqa": _FLAG,
    },
    relations=(
        Relation("key", _HEADS, ("enable_gqa", "Hq", "Hk"), _divides),
        Relation("value", _HEADS, ("enable_gqa", "Hq", "Hv"), _divides),
    ),
    empty="... T S",
)
