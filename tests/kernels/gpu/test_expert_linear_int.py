"""expert_linear_int and expert_linear_a16 on a GPU against their references: awkward shapes, the widths of models."""

# Operands are unpacked from tuples of unknown length.
# pyright: reportCallIssue=false

from typing import Any

import pytest
import torch

from qpcompile.kernels.expert_linear_a16 import op as on_floats
from qpcompile.kernels.expert_linear_a16 import reference as float_reference
from qpcompile.kernels.expert_linear_int import op, reference
from qpcompile.kernels.linear_int.packing import stored_codes
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic

# Tokens, rows per token, slots per token, experts, outputs, channels.
SHAPES = [(5, 1, 2, 4, 33, 45), (1, 1, 8, 128, 1536, 2048), (300, 8, 8, 16, 512, 768), (0, 1, 2, 4, 6, 12)]


def operands(shape: tuple[int, ...], bits: int, weight_bits: int) -> tuple[Any, ...]:
    tokens, rows, slots, experts, outputs, channels = shape
    q, scale = quantize_dynamic(torch.randn(tokens, rows, channels, device="cuda"), 0, 1.0, bits)
    codes, weight_scale = quantize_dynamic(torch.randn(experts * outputs, channels, device="cuda"), 0, 1.0, weight_bits)
    stored = (each.unflatten(0, (experts, outputs)) for each in (stored_codes(codes, weight_bits), weight_scale))
    return q, scale, *stored, torch.randint(0, experts, (tokens, slots), device="cuda")


@pytest.mark.parametrize(("bits", "weight_bits"), [(4, 4), (8, 4), (8, 8)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operator_is_the_reference(shape: tuple[int, ...], bits: int, weight_bits: int) -> None:
    given = operands(shape, bits, weight_bits)
    found = op.expert_linear_int(*given, torch.bfloat16, bits)
    assert torch.equal(found, reference.expert_linear_int(*given, torch.bfloat16))
    x = torch.randn(given[0].shape, device="cuda")
    expected = float_reference.expert_linear_a16(x, *given[2:])
    torch.testing.assert_close(on_floats.expert_linear_a16(x, *given[2:]), expected, rtol=1e-3, atol=1e-2)


def test_a_call_can_be_captured() -> None:
    """Nothing is copied to the host."""
    given = operands(SHAPES[1], 4, 4)
    op.expert_linear_int(*given, torch.bfloat16, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.expert_linear_int(*given, torch.bfloat16, 4)
    graph.replay()
    assert torch.equal(y, reference.expert_linear_int(*given, torch.bfloat16))
