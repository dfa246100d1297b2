"""Normalize the arguments of an `aten::scaled_dot_product_attention` node, positional or by keyword."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpcompile.ir.shapes import value

_SPELLING = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Attention:
    """The operands of an attention node. mask: None if all keys are visible, or, if `causal`, those up to the query."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float


def read_attention(node: fx.Node) -> Attention:
    """The arguments of an attention node, positional or not; the scale defaults to 1 / sqrt(head width)."""
    given = {**dict(zip(_SPELLING, node.args, strict=False)), **node.kwargs}
    query, key, held, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(held, fx.Node)
    scale = given.get("scale")
    if not isinstance(scale, float):
        scale = float(value(query).shape[-1]) ** -0.5
    return Attention(
        query, key, held, mask if isinstance(mask, fx.Node) else None, given.get("is_causal") is True, scale
    )
