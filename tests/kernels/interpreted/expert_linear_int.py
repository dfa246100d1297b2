"""Cases for expert_linear_int's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file."""

# Operands are unpacked from tuples of unknown length.
# pyright: reportCallIssue=false

from typing import Any

import pytest
import torch

from qpcompile.kernels.expert_linear_int import reference
from qpcompile.kernels.expert_linear_int import triton as kernels
from qpcompile.kernels.linear_int.packing import stored_codes
from qpcompile.kernels.linear_int.tuning import Tile
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic

SMALL = Tile(out=32, tokens=16, step=64, warps=4, stages=2)
# Tokens, rows per token, slots per token, experts, outputs, channels.
SHAPES = [(5, 1, 2, 4, 33, 45), (1, 1, 1, 1, 1, 1), (40, 3, 3, 5, 70, 256), (9, 2, 4, 30, 5, 96), (0, 1, 2, 4, 6, 12)]


def operands(shape: tuple[int, ...], bits: int, weight_bits: int, groups: int = 1) -> tuple[Any, ...]:
    tokens, rows, slots, experts, outputs, channels = shape
    made = torch.Generator().manual_seed(0)
    q, scale = quantize_dynamic(torch.randn(tokens, rows, channels, generator=made), 0, 1.0, bits)
    dense = torch.randn(experts * outputs, channels, generator=made)
    codes, weight_scale = quantize_dynamic(dense, channels // groups, 1.0, weight_bits)
    stored = (each.unflatten(0, (experts, outputs)) for each in (stored_codes(codes, weight_bits), weight_scale))
    return q, scale, *stored, torch.randint(0, experts, (tokens, slots), generator=made)


@pytest.mark.parametrize(("bits", "weight_bits"), [(4, 4), (8, 4), (8, 8)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference(shape: tuple[int, ...], bits: int, weight_bits: int) -> None:
    given = operands(shape, bits, weight_bits)
    for dtype in (torch.float32, torch.float16):
        found = kernels.expert_linear_int(*given, dtype, bits, tile=SMALL)
        assert torch.equal(found, reference.expert_linear_int(*given, dtype))


def test_groups_are_products_per_expert() -> None:
    given = operands((7, 1, 2, 3, 20, 96), 8, 4, groups=3)
    found = kernels.expert_linear_int(*given, torch.float32, 8)
    torch.testing.assert_close(found, reference.expert_linear_int(*given, torch.float32), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("tile", [kernels.FEW, kernels.MANY], ids=str)
def test_tiles_and_experts_of_one_token(tile: Tile) -> None:
    q, scale, *weight, index = operands((70, 1, 2, 6, 40, 256), 8, 4)
    for chosen in (index, index * 0 + 5, index.int()):
        found = kernels.expert_linear_int(q, scale, *weight, chosen, torch.float32, 8, tile=tile)
        assert torch.equal(found, reference.expert_linear_int(q, scale, *weight, chosen, torch.float32))


def test_an_index_that_names_no_expert_reads_and_writes_nothing() -> None:
    q, scale, *weight, index = operands(SHAPES[0], 8, 4)
    expected = reference.expert_linear_int(q, scale, *weight, index, torch.float32)
    for wrong in (4, -1, 2**40):
        index[2, 1] = wrong
        found = kernels.expert_linear_int(q, scale, *weight, index, torch.float32, 8, tile=SMALL)
        assert found[2, 1].isnan().all()
        found[2, 1] = expected[2, 1]
        assert torch.equal(found, expected)
