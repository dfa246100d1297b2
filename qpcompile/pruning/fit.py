"""Weights of a token's cues, solved by ridge regression for what dropping it costs.

    w = argmin sum over samples, tokens of (c_i - w . x_i)^2 + ridge |w|^2

x_i: inter, magnitude, intra, residual of token i after a layer, as the operator `token_scores` normalises them; c_i:
its first-order cost (qpcompile/calibration/drop_gradients.py), normalised in the same way. Both are centred in each
sample, since only their order within one matters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qpcompile.ir.edit import clone, first_node_of_layer
from qpcompile.ir.program import PREFILL, Graph, Program
from qpcompile.ir.shapes import add_input, add_output, value
from qpcompile.kernels.token_scores.normalize import normalize_metric
from qpcompile.pruning.methods.quota import weighted_scores
from qpcompile.pruning.pruner import Point, attention_layers
from qpcompile.pruning.scores import FITTED
from qpcompile.recipe.plan import Cut
from qpcompile.recipe.tokens import TokenScheme
from qpcompile.runtime.machine import VALID, VISUAL

RIDGE = 1e-2
CUE = "cue"
DIGITS = 4

Weights = dict[tuple[str, int], tuple[float, ...]]
"""Fitted weights by the name of the score and the layer."""


def cue_graph(program: Program) -> Graph:
    """The prefill graph without cuts, and as outputs `cue.LAYER.NUMBER` the cues after every layer but the last that
    can score tokens.

    Its inputs VISUAL and VALID, bool[B, S], mark the tokens that are visual, and the prompt's.
    """
    graph = clone(program.graphs[PREFILL])
    embeddings = value(graph.placeholder("inputs_embeds"))
    batch, length = embeddings.shape[:2]
    visual = add_input(graph, VISUAL, (batch, length), torch.bool)
    valid = add_input(graph, VALID, (batch, length), torch.bool)
    for layer in sorted(attention_layers(graph) - {len(program.layers) - 1}):
        cut = Cut(layer=layer, ratio=1.0, numerator=1, denominator=1)
        before = first_node_of_layer(graph, layer + 1)
        point = Point(graph, before, cut, program.recipe, visual, valid, None, valid, length, visual)
        for number, (weights, queries) in enumerate(_columns()):
            scores = weighted_scores(point, weights, queries, program.recipe.tokens.normalize)
            add_output(graph, f"{CUE}.{layer}.{number}", scores)
    graph.module.recompile()
    return graph


def _columns() -> list[tuple[tuple[float, ...], str]]:
    """Weights and queries of each cue: inter for the queries of each fitted score, then the other three."""
    text = [((1.0, 0.0, 0.0, 0.0), queries) for queries in FITTED.values()]
    others = [tuple(float(place == number) for place in range(4)) for number in (1, 2, 3)]
    return [*text, *((weights, "after_image") for weights in others)]


@dataclass
class Fit:
    """Sums of the normal equations, per fitted score and layer."""

    tokens: TokenScheme
    squares: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    products: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def add(self, cues: dict[str, torch.Tensor], costs: dict[int, torch.Tensor], counted: torch.Tensor) -> None:
        """One sample: outputs of the cue graph, the costs of its tokens, and which of them are visual, bool[B, S]."""
        for layer, cost in costs.items():
            wanted = normalize_metric(cost, counted, self.tokens.normalize, *self.tokens.percentiles)
            columns = [cues[f"{CUE}.{layer}.{number}"] for number in range(len(FITTED) + 3)]
            for place, name in enumerate(FITTED):
                features = torch.stack([columns[place], *columns[len(FITTED) :]], dim=-1)
                for row, marks in enumerate(counted):
                    self._add((name, layer), features[row, marks].double(), wanted[row, marks].double())

    def _add(self, key: tuple[str, int], features: torch.Tensor, wanted: torch.Tensor) -> None:
        """features: f64[N, 4], wanted: f64[N]."""
        if not len(features):
            return
        features, wanted = features - features.mean(dim=0), wanted - wanted.mean()
        self.squares[key] = self.squares.get(key, 0) + features.T @ features / len(features)
        self.products[key] = self.products.get(key, 0) + features.T @ wanted / len(features)

    def weights(self) -> Weights:
        """The solved weights, the largest 1; attention alone where the cues say nothing."""
        found: Weights = {}
        for key, square in self.squares.items():
            ridge = RIDGE * square.diagonal().mean().clamp(min=1e-12)
            solved = torch.linalg.solve(square + ridge * torch.eye(4, dtype=torch.float64), self.products[key])
            largest = float(solved.abs().max())
            parts = [round(float(part) / largest, DIGITS) for part in solved] if largest > 0 else [1.0, 0.0, 0.0, 0.0]
            found[key] = tuple(parts)
        return found
