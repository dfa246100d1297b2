"""Read attention nodes and what they append to: `aten::scaled_dot_product_attention`, `cat([past, new], -2)`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpcompile.ir.edit import aten, is_call, operands
from qpcompile.ir.shapes import same, value

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


def attends_to_itself(node: fx.Node) -> bool:
    """Whether the keys of an attention node are those of the queries' own tokens, and not of another sequence."""
    read = read_attention(node)
    return same(value(read.query).shape[2], value(read.key).shape[2])


def appended(node: fx.Node) -> fx.Node | None:
    """What `cat([past, new], -2)` appends to the tokens of a cache; None for any other node.

    Halves of a head that are joined on the last axis are no append.
    """
    if not is_call(node, aten.cat.default):
        return None
    parts, axis = operands(node)["tensors"], operands(node)["dim"]
    rank = value(node).ndim
    if len(parts) != 2 or not isinstance(parts[1], fx.Node) or axis % rank != rank - 2:
        return None
    return parts[1]


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
