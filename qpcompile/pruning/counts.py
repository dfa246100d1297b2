"""How many rows a cut keeps, as nodes of a graph: the slots of a batch, and the quota of each of its rows.

slots   N = S - (V - ceil(V * ratio))         V: the smallest number of visual tokens of a row, a size
quota   n_b = text_b + ceil(V_b * ratio)      V_b: the row's own
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from qpcompile.ir.edit import aten
from qpcompile.ir.shapes import new_size, value
from qpcompile.pruning.pruner import Point


def slots(point: Point, total: fx.Node, smallest: fx.Node) -> fx.Node:
    """N, with the point's surplus: how many of `total` tokens a row has room for; `smallest` of them are visual."""
    stays, _ = _stays(point, total, smallest)
    if point.surplus is not None:
        stays = point.call(operator.add, stays, point.surplus)
    # A fresh symbol: shapes after the cut take half as long to compute as with the quotient it replaces. Sizes below 2
    # would be numbers.
    stays.meta["val"] = new_size(point.graph, f"kept.{point.layer}.size", max(2, value(stays).node.hint))
    return stays


def surplus(point: Point, total: fx.Node, smallest: fx.Node) -> fx.Node:
    """How many tokens to add to N to reach a multiple of `tokens.multiple_of`, or all tokens if there are fewer."""
    multiple = point.recipe.tokens.multiple_of
    stays, dropped = _stays(point, total, smallest)
    raised = point.call(operator.floordiv, point.call(operator.add, stays, multiple - 1), multiple)
    missing = point.call(operator.sub, point.call(operator.mul, raised, multiple), stays)
    return point.call(torch.sym_min, missing, dropped)


def rows_quota(point: Point, valid: fx.Node, visual: fx.Node) -> fx.Node:
    """The quota of each row, i64[B]: its text tokens and its share of its own visual tokens, both bool[B, S]."""
    text = point.call(aten.bitwise_and.Tensor, valid, point.call(aten.bitwise_not.default, visual))
    texts = point.call(aten.sum.dim_IntList, text, [1])
    return point.call(aten.add.Tensor, texts, point.share(visual))


def _stays(point: Point, total: fx.Node, smallest: fx.Node) -> tuple[fx.Node, fx.Node]:
    """N and S - N: how many tokens the ratio alone keeps, and how many it drops."""
    dropped = point.call(operator.sub, smallest, _share(point, smallest))
    return point.call(operator.sub, total, dropped), dropped


def _share(point: Point, size: fx.Node) -> fx.Node:
    """ceil(size * numerator / denominator) on a symbolic size."""
    scaled = point.times_numerator(operator.mul, size)
    raised = point.call(operator.add, scaled, point.cut.denominator - 1)
    return point.call(operator.floordiv, raised, point.cut.denominator)
