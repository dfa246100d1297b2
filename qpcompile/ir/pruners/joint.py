"""joint: the schedule with the least measured cost, attention of the text inside the decoder, diversity in front of it.

    schedule   shares per layer that minimise the measured divergence of the next token for a mean number of tokens
               (passes/measure_cuts.py, qpcompile/ir/cut_costs.py); a layer that reads the picture keeps it, layers
               that have read it let it go
    score      behind layer l: attention from the text's queries, mean over heads, of the quantized layer
               in front of the decoder, where nothing has looked yet: CDPruner's relevance and diversity

Ours. QUOTA (arXiv 2604.17320) shares a fixed drop by a softmax over each layer's own deviation, and mixes magnitude,
visual attention and residual into the score.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from qpcompile.ir.cut_costs import CutCosts, solve_schedule
from qpcompile.ir.program import Program
from qpcompile.ir.pruners.cdpruner import CdPruner
from qpcompile.ir.pruners.pruner import INPUT, Point, Pruner, Schedule
from qpcompile.ir.pruners.queries import QUERIES, attention_from
from qpcompile.recipe import Recipe


@dataclass(frozen=True)
class Joint:
    """See the module's docstring."""

    in_front: Pruner = field(default_factory=CdPruner)

    def profiles(self, recipe: Recipe) -> bool:
        """The schedule rests on what cuts cost on samples."""
        return True

    def schedule(self, program: Program) -> Schedule:
        """Least cost for the mean that the recipe asks for."""
        tokens = program.recipe.tokens
        costs: CutCosts = program.facts["cut_costs"]
        shares = solve_schedule(costs, tokens.keep, tokens.max_candidates)
        layers = [layer for layer, share in enumerate(shares) if share < (1.0 if layer == 0 else shares[layer - 1])]
        ratios = tuple(shares[layer] for layer in layers)
        return Schedule(tuple(layer + INPUT for layer in layers), lambda keep: ratios)

    def scores(self, point: Point) -> fx.Node:
        """What the text looks at, or, in front of the decoder, what is relevant and unlike the rest."""
        tokens = point.recipe.tokens
        if point.layer == INPUT:
            return self.in_front.scores(point)
        return attention_from(point, QUERIES[tokens.queries](point), point.attention())
