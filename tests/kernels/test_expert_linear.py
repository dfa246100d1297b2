"""expert_linear: every slot gets the product with its expert's weight, in torch and in ONNX; unknown experts fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.expert_linear import blocks, reference
from qpcompile.kernels.expert_linear.op import OVERLOAD, expert_linear

# Tokens, rows per token, slots per token, experts, outputs, channels.
SHAPES = [(5, 1, 2, 4, 6, 12), (7, 3, 3, 5, 3, 7), (4, 2, 4, 3, 5, 8), (1, 1, 1, 1, 1, 1), (0, 1, 2, 4, 6, 12)]


def case(
    tokens: int, rows: int, slots: int, experts: int, outputs: int, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, rows, channels, generator=made)
    weight = torch.randn(experts, outputs, channels, generator=made)
    return x, weight, torch.randint(0, experts, (tokens, slots), generator=made)


def test_written_out() -> None:
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    weight = torch.tensor([[[1.0, 0.0]], [[0.0, 10.0]]])
    expected = [[[20.0], [1.0]], [[3.0], [3.0]]]
    index = torch.tensor([[1, 0], [0, 0]])
    assert reference.expert_linear(x, weight, index).tolist() == expected
    assert expert_linear(x, weight, index).tolist() == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape: tuple[int, ...]) -> None:
    x, weight, index = case(*shape)
    expected = reference.expert_linear(x.double(), weight.double(), index)
    assert torch.allclose(expert_linear(x, weight, index).double(), expected, rtol=1e-5, atol=1e-5)
    apart = x.transpose(0, 2).contiguous().transpose(0, 2), weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.allclose(blocks.expert_linear(*apart, index.int()).double(), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_does_not_exist_is_refused() -> None:
    x, weight, index = case(*SHAPES[0])
    for wrong in (4, -1):
        index[2, 1] = wrong
        with pytest.raises(KernelError, match=f"expert {wrong} of 4"):
            expert_linear(x, weight, index)
    with pytest.raises(KernelError, match="J must be a multiple of I"):
        expert_linear(x.expand(-1, 2, -1), weight, index[:, :1])


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(expert_linear, case(*shape))


class _Layer(torch.nn.Module):
    """Experts of tokens in rows, as a layer flattens them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return OVERLOAD(x.flatten(0, 1).unsqueeze(1), self.weight, index.flatten(0, 1))


def test_onnx_equals_the_reference(export_onnx: Any) -> None:
    from qpcompile.kernels.expert_linear import onnx

    made = torch.Generator().manual_seed(1)
    layer = _Layer(torch.randn(4, 6, 12, generator=made))
    inputs = [
        (torch.randn(rows, tokens, 12, generator=made), torch.randint(0, 4, (rows, tokens, 2), generator=made))
        for rows, tokens in ((2, 3), (1, 7))
    ]
    exported = export_onnx(layer, inputs[0], {OVERLOAD: onnx.expert_linear})
    for x, index in inputs:
        (found,) = exported(x, index)
        assert torch.allclose(torch.as_tensor(found), layer(x, index), atol=1e-5)
