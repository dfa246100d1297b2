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


def kept(layer: LinearAttentionLayer) -> Tensor:
    state = layer.conv_states[0]
    assert state is not None
    return state


class Convolution(nn.Module):
    """What a layer keeps of f[B, S, C], and what it convolves."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layer = LinearAttentionLayer()
        taken = layer.update_conv_state(x.transpose(1, 2), conv_kernel_size=KERNEL)
        return kept(layer), taken[:, :, -x.shape[1] :]


@pytest.mark.parametrize("tokens", [1, 2, KERNEL, 9])
def test_a_graph_of_a_long_prompt_keeps_the_state_of_any(tokens: int) -> None:
    with traceable(Convolution()):
        graph = traced(Convolution(), {"x": torch.ones(2, 7, 3)}, outputs=["state", "taken"])
    make_functional(graph.module)
    graph.module.recompile()
    x = torch.arange(2.0 * tokens * 3).view(2, tokens, 3) + 1
    state, taken = run(graph, x=x).values()
    expected, whole = Convolution()(x)
    assert state.shape == (2, 3, KERNEL) and torch.equal(state, expected) and torch.equal(taken, whole)


def test_later_tokens_and_states_of_their_own_size_are_left_to_transformers() -> None:
    with traceable(nn.Identity()):
        layer = LinearAttentionLayer()
        assert layer.update_conv_state(torch.ones(1, 2, 3)).shape == (1, 2, 3)
        assert kept(layer).shape == (1, 2, 3)
        after = layer.update_conv_state(torch.zeros(1, 2, 1), conv_kernel_size=3)
    assert after.tolist() == [[[1.0, 1.0, 1.0, 0.0]] * 2] and kept(layer).tolist() == [[[1.0, 1.0, 0.0]] * 2]
