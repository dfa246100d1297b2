"""First-order costs of dropping tokens, against taking a little of one token away."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from programs import HERE, captured, fresh
from torch import Tensor, fx

from qpcompile.calibration.drop_gradients import drop_costs
from qpcompile.ir.attention import read_attention
from qpcompile.ir.edit import aten, is_call, layer_of
from qpcompile.ir.program import HEAD, PREFILL, Graph
from qpcompile.quality.recorded import record_answers
from qpcompile.recipe.recipe import Recipe

STEP = 0.02


class Less(fx.Interpreter):
    """A graph whose attention after a layer sees `share` of one key."""

    def __init__(self, graph: Graph, layer: int, place: int, share: float) -> None:
        super().__init__(graph.module)
        self.layer, self.place, self.share = layer, place, share

    def run_node(self, n: fx.Node) -> Any:
        if not is_call(n, aten.scaled_dot_product_attention.default) or (layer_of(n) or 0) <= self.layer:
            return super().run_node(n)
        read = read_attention(n)
        query, key, value = (self.env[node] for node in (read.query, read.key, read.value))
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
        scores = query @ key.mT * read.scale
        scores[..., self.place] += math.log(self.share)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if read.mask is None else self.env[read.mask]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ value


@torch.no_grad()
def test_the_cost_is_how_fast_the_answer_suffers() -> None:
    program = fresh(Recipe.load("none"))
    prefill, head = program.graphs[PREFILL], program.graphs[HEAD]
    (answered,) = record_answers(program, [captured()[1]["one"]], 1, 3)
    full, feeds = answered.full, answered.feeds
    costs = drop_costs(prefill, head, feeds, full.tokens, full.counted, HERE)
    assert sorted(costs) == [0, 1] and float(costs[0].abs().max()) > 1e-4

    def log_odds(layer: int, place: int, share: float) -> Tensor:
        hidden = Less(prefill, layer, place, share).run(*[feeds[path] for path in prefill.inputs])[0]
        logits = head({head.inputs[0]: hidden[:, -full.tokens.shape[1] :]})[head.outputs[0]].double()
        own = logits.gather(-1, full.tokens[..., None])[..., 0]
        return (own - logits.scatter(-1, full.tokens[..., None], -torch.inf).logsumexp(-1))[full.counted].sum()

    for layer in (0, 1):
        place = int(costs[layer][0].abs().argmax())
        change = log_odds(layer, place, 1 + STEP) - log_odds(layer, place, 1 - STEP)
        assert float(costs[layer][0, place]) == pytest.approx(float(change) / (2 * STEP), rel=0.02)
