"""QAPruner's quantization risk, and its combination with the score of another method.

Source: QAPruner (arXiv 2604.02816), section 3.
"""

from __future__ import annotations

from torch import fx

from qpcompile.ir.operators import FUSE_RISK, QUANTIZATION_RISK
from qpcompile.pruning.before_decoder import counted_tokens
from qpcompile.pruning.pruner import Operators, Point

RISK_OPERATORS: Operators = (QUANTIZATION_RISK, FUSE_RISK)
"""Operators of the functions here."""


def quantization_risk(point: Point) -> fx.Node:
    """f32[B, N] in 0..1: the 4-bit quantization risk of each visual token, by the recipe's metric."""
    risk = point.recipe.tokens.risk
    return point.call(QUANTIZATION_RISK, point.hidden(), counted_tokens(point), risk.metric, risk.group_size)


def fuse_risk(point: Point, scores: fx.Node, *, minmax: bool) -> fx.Node:
    """`scores: f32[B, N]` combined with the risk; minmax: for scores that are not yet in 0..1."""
    risk, counted = point.recipe.tokens.risk, counted_tokens(point)
    return point.call(FUSE_RISK, scores, quantization_risk(point), counted, risk.alpha, risk.dynamic_alpha, minmax)


def with_risk(point: Point, scores: fx.Node) -> fx.Node:
    """`scores: f32[B, N]`, combined with the risk if the recipe sets `tokens.risk.fuse`."""
    return fuse_risk(point, scores, minmax=True) if point.recipe.tokens.risk.fuse else scores
