"""What a method reads at a cut: the residual stream, and the attention over the decoder's own tokens."""

from __future__ import annotations

import pytest
import torch
from programs import changed_recipe, traced
from torch import Tensor, nn

from qpcompile.errors import PlanError
from qpcompile.ir.attention import attends_to_itself
from qpcompile.ir.edit import aten, calls
from qpcompile.ir.program import Graph
from qpcompile.ir.shapes import add_input, value
from qpcompile.pruning.pruner import Point, attention_layers, attention_node
from qpcompile.recipe.plan import Cut

C = 8


class Streams(nn.Module):
    """Two residual streams of a token, as hyper-connections have them; `wide` is the width of each."""

    def __init__(self, wide: int = C) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        streams = torch.sin(inputs_embeds)[:, :, None, : self.wide].expand(-1, -1, 2, -1).contiguous()
        return torch.cos(streams).sum(dim=2)


class Layer(nn.Module):
    """Attention over the tokens, or over others, or both."""

    def __init__(self, own: bool, crossing: bool) -> None:
        super().__init__()
        self.own, self.crossing = own, crossing

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        x = x + attend(x[:, None], x[:, None], x[:, None])[:, 0] if self.own else x
        return x + attend(x[:, None], others[:, None], others[:, None])[:, 0] if self.crossing else x


class Crossed(nn.Module):
    """Three layers: self-attention, both kinds, and cross-attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(True, False), Layer(True, True), Layer(False, True)])

    def forward(self, inputs_embeds: Tensor, others: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, others)
        return inputs_embeds


def point_of(graph: Graph) -> Point:
    batch, length = value(graph.placeholder("inputs_embeds")).shape[:2]
    visual, alive = (add_input(graph, name, (batch, length), torch.bool) for name in ("visual", "alive"))
    cut = Cut(layer=0, ratio=0.5, numerator=1, denominator=2)
    before = next(calls(graph, aten.cos.default))
    return Point(graph, before, cut, changed_recipe("prune-30"), visual, alive, None, alive, length, visual)


def test_streams_of_a_token_are_side_by_side() -> None:
    point = point_of(traced(Streams(), {"inputs_embeds": torch.ones(2, 5, C)}))
    found = point.hidden()
    assert found.target is aten.flatten.using_ints and value(found).shape[2] == 2 * C
    point.replace_hidden(found)
    (new,) = point.before.all_input_nodes
    assert new.target is aten.view_as.default and value(new).shape[2:] == (2, C)


def test_streams_of_another_width_are_no_residual() -> None:
    with pytest.raises(PlanError, match="no residual stream"):
        point_of(traced(Streams(C - 1), {"inputs_embeds": torch.ones(2, 5, C)})).hidden()


def test_layers_that_attend_to_others_only_do_not_score() -> None:
    graph = traced(Crossed(), {"inputs_embeds": torch.ones(2, 5, C), "others": torch.ones(2, 7, C)})
    assert attention_layers(graph) == {0, 1}
    assert attends_to_itself(attention_node(graph, 1))
    with pytest.raises(PlanError, match="layer 2 has 0 attention nodes over tokens"):
        attention_node(graph, 2)
