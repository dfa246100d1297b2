"""Cases for linear_w4a4's Triton kernels under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.linear_w4a4 import reference
from qpcompile.kernels.linear_w4a4 import triton as kernels
from qpcompile.kernels.linear_w4a4.packing import pack_int4

SMALL = kernels.Tile(out=16, tokens=16, step=32, warps=4, stages=2)


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    """i8[shape] over the whole range of 4 bits."""
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"),
    [(0, 8, 8), (1, 1, 1), (1, 256, 33), (17, 17, 5), (63, 300, 40), (17, 512, 16), (3, 255, 18), (16, 64, 16)],
)
def test_integer_sums_are_exact(tokens: int, in_features: int, out_features: int) -> None:
    q, codes = random_codes(tokens, in_features), random_codes(out_features, in_features, seed=1)
    # With scales of one the result is the integer sum, which float32 holds.
    y = kernels.linear_w4a4(
        q, torch.ones(tokens, 1), pack_int4(codes), torch.ones(out_features, 1), None, torch.float32, SMALL
    )
    assert torch.equal(y.to(torch.int32), reference.integer_product(q, codes))


@pytest.mark.parametrize("tile", kernels.TILES.values(), ids=str)
def test_every_tile_of_the_table(tile: kernels.Tile) -> None:
    q, codes = random_codes(20, 512), random_codes(70, 512, seed=1)
    y = kernels.linear_w4a4(q, torch.ones(20, 1), pack_int4(codes), torch.ones(70, 1), None, torch.float32, tile)
    assert torch.equal(y.to(torch.int32), reference.integer_product(q, codes))


def test_extremes_fit_the_accumulator_and_the_operands() -> None:
    q, codes = torch.full((2, 1024), -8, dtype=torch.int8), torch.full((3, 1024), -8, dtype=torch.int8)
    y = kernels.linear_w4a4(q, torch.ones(2, 1), pack_int4(codes), torch.ones(3, 1), None, torch.float32)
    assert torch.equal(y, torch.full((2, 3), 64.0 * 1024))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("groups", "weight_groups"), [(1, 1), (3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("in_features", [96, 33])
def test_scales_and_bias(in_features: int, groups: int, weight_groups: int, dtype: torch.dtype) -> None:
    q, weight = random_codes(2, 9, in_features), pack_int4(random_codes(21, in_features, seed=1))
    scale, weight_scale = torch.rand(2, 9, groups) + 0.5, torch.rand(21, weight_groups) + 0.5
    bias = torch.rand(21).to(dtype)
    found = kernels.linear_w4a4(q, scale, weight, weight_scale, bias, dtype, SMALL)
    expected = reference.linear_w4a4(q, scale, weight, weight_scale, bias, dtype)
    # The interpreter cuts float32 to bfloat16 where hardware rounds: one unit in its last place.
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("groups", [1, 3])
def test_strided_operands(groups: int) -> None:
    q, scale = random_codes(96, 5).T, (torch.rand(10, groups) + 0.5)[::2]
    weight, weight_scale = pack_int4(random_codes(14, 96, seed=1))[::2], (torch.rand(groups, 7) + 0.5).T
    found = kernels.linear_w4a4(q, scale, weight, weight_scale, None, torch.float32, SMALL)
    expected = reference.linear_w4a4(q, scale, weight, weight_scale, None, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_prepared_activations() -> None:
    q = random_codes(5, 6)
    x, sums = kernels.prepare_activations(q)
    assert torch.equal(x, torch.cat([q[:, :3] * 16, q[:, 3:]], 1))
    assert sums.tolist() == q[:, :3].sum(1).tolist()


def test_tile_table_is_walked_upwards() -> None:
    assert [kernels.tile_for(tokens) for tokens in (1, 16, 17, 2048, 9999)] == [
        kernels.TILES[limit] for limit in (16, 16, 64, 2048, 2048)
    ]
