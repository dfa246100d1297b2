"""Layers of the decoder are those that fill the cache; a tower inside of it has others."""

from __future__ import annotations

import torch
from programs import traced
from torch import Tensor, nn

from qpcompile.capture.decoder_layers import layers_of, name_other_layers
from qpcompile.ir.edit import layer_of
from qpcompile.ir.program import Graph
from qpcompile.ir.text import graph_text


class Layer(nn.Module):
    """A layer: x W, and what it would cache."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.key(x)


class Decoder(nn.Module):
    """A tower of three layers, and two layers of its own that cache what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.layers = nn.Module(), nn.ModuleList([Layer(), Layer()])
        self.tower.blocks = nn.ModuleList([Layer(), Layer(), Layer()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for block in self.tower.blocks:  # type: ignore[union-attr]
            x = block(x)
        first = self.layers[0](x)
        second = self.layers[1](first)
        return second + x, first, second


def graph_of(cached: str) -> Graph:
    torch.manual_seed(0)
    return traced(Decoder(), {"x": torch.ones(2, 3, 4)}, outputs=["y", f"{cached}.0.key", f"{cached}.1.key"])


def test_layers_of_a_tower_in_the_decoder_are_not_counted() -> None:
    graph = graph_of("past_key_values")
    assert [layer.index for layer in layers_of(graph)] == [0, 1, 2]
    name_other_layers(graph)
    assert [layer.index for layer in layers_of(graph)] == [0, 1]
    text = [line[2:] for line in graph_text(graph).splitlines() if line.startswith("# ")]
    assert text == ["tower", "layers.0", "layers.1", "top"]
    outside = [node.meta["nn_module_stack"] for node in graph.nodes if layer_of(node) is None and node.op[:4] == "call"]
    assert "tower.blocks_2.key" in str(outside[2])
    before = graph_text(graph)
    name_other_layers(graph)
    assert graph_text(graph) == before


def test_without_a_cache_nothing_is_renamed() -> None:
    graph = graph_of("hidden_states")
    before = graph_text(graph)
    name_other_layers(graph)
    assert graph_text(graph) == before and [layer.index for layer in layers_of(graph)] == [0, 1, 2]
