"""Residual adds are fused into the preceding linear's epilogue, bit for bit; near misses are unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import run, traced
from torch import Tensor, nn

from qpcompile.ir.edit import aten, calls, clone
from qpcompile.ir.operators import LINEAR_W4A4
from qpcompile.kernels.linear_w4a4.packing import pack_int4
from qpcompile.runtime.residual_epilogue import join_residuals

Add = Callable[[Tensor, Tensor], Tensor]
TOKENS = {"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))}


class Layer(nn.Module):
    """A linear on codes, and `add` of its input and its result."""

    scale: Tensor

    def __init__(self, add: Add) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add = add
        self.register_buffer("weight", pack_int4(torch.randint(-8, 8, (16, 16)).to(torch.int8)))
        self.register_buffer("scale", torch.rand(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, step = torch.ops.qpcompile.quantize_int4(x, 0, 1.0)
        return self.add(x, torch.ops.qpcompile.linear_w4a4(q, step, self.weight, self.scale, None, torch.float32))


@pytest.mark.parametrize("add", [lambda x, y: x + y, lambda x, y: y + x], ids=["behind", "in front"])
def test_joins_a_sum_once(add: Add) -> None:
    graph = traced(Layer(add), TOKENS)
    expected = run(graph, **TOKENS)["y"]
    assert join_residuals(graph) == 1
    graph.module.graph.lint()
    graph.module.recompile()
    assert not list(calls(graph, aten.add.Tensor)) and len(list(calls(graph, LINEAR_W4A4))) == 1
    assert torch.equal(run(graph, **TOKENS)["y"], expected)
    assert join_residuals(graph) == 0


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: x[:1] + y,
        lambda x, y: x.double() + y,
        lambda x, y: x + y + torch.relu(y),
        lambda x, y: y + 1.0,
    ],
    ids=["weighed", "broadcast", "wider", "read twice", "number"],
)
def test_leaves_other_sums(add: Add) -> None:
    graph = traced(Layer(add), TOKENS)
    before = [node.name for node in clone(graph).nodes]
    assert join_residuals(graph) == 0
    assert [node.name for node in graph.nodes] == before
