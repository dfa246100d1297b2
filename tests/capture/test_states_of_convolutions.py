"""The state of a causal convolution, of prompts that are longer than its kernel and shorter."""

from __future__ import annotations

import pytest
import torch
from programs import run, traced
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from qpcompile.capture.adapters import traceable
from qpcompile.capture.functional import make_functional

KERNEL = 4


def kept(layer: LinearAttentionLayer, place: int = 0) -> Tensor:
    state = layer.conv_states[place]
    assert state is not None
    return state


class Convolution(nn.Module):
    """What a layer with two convolutions keeps of f[B, S, C], and what it convolves."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        layer = LinearAttentionLayer(number_of_states=2)
        x = x.transpose(1, 2)
        first = layer.update_conv_state(x, conv_kernel_size=KERNEL)
        second = layer.update_conv_state(x * 2, 1, conv_kernel_size=KERNEL)
        return kept(layer), kept(layer, 1), *(taken[:, :, -x.shape[2] :] for taken in (first, second))


@pytest.mark.parametrize("tokens", [1, 2, KERNEL, 9])
def test_a_graph_of_a_long_prompt_keeps_the_state_of_any(tokens: int) -> None:
    with traceable(Convolution()):
        graph = traced(Convolution(), {"x": torch.ones(2, 7, 3)}, outputs=["state", "other", "taken", "more"])
    make_functional(graph.module)
    graph.module.recompile()
    x = torch.arange(2.0 * tokens * 3).view(2, tokens, 3) + 1
    for found, expected in zip(run(graph, x=x).values(), Convolution()(x), strict=True):
        assert torch.equal(found, expected)


def test_later_tokens_and_states_of_their_own_size_are_left_to_transformers() -> None:
    with traceable(nn.Identity()):
        layer = LinearAttentionLayer()
        assert layer.update_conv_state(torch.ones(1, 2, 3)).shape == (1, 2, 3)
        assert kept(layer).shape == (1, 2, 3)
        after = layer.update_conv_state(torch.zeros(1, 2, 1), conv_kernel_size=3)
    assert after.tolist() == [[[1.0, 1.0, 1.0, 0.0]] * 2] and kept(layer).tolist() == [[[1.0, 1.0, 0.0]] * 2]
