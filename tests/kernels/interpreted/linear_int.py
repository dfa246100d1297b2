"""Cases for linear_int's Triton kernels under Triton's interpreter; test_triton_interpreter.py runs this file."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.linear_int import reference
from qpcompile.kernels.linear_int import triton as kernels
from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.linear_int.tuning import BUCKETS, Tile, start_tile

SMALL = Tile(out=32, tokens=16, step=32, warps=4, stages=2)


def random_codes(*shape: int, seed: int = 0, bits: int = 4) -> Tensor:
    """i8[shape] over the whole range of `bits` bits."""
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def exact(q: Tensor, codes: Tensor, tile: Tile | None, bits: int = 4) -> Tensor:
    """The kernel's integer sums i32[T, N]: with scales of one the result is the sum, exact in float32."""
    ones = torch.ones(q.shape[0], 1), torch.ones(codes.shape[0], 1)
    y = kernels.linear_int(q, ones[0], pack_int4(codes), ones[1], None, torch.float32, bits, tile=tile)
    return y.to(torch.int32)


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"),
    [
        *[(0, 8, 8), (1, 1, 1), (1, 256, 33), (5, 17, 5), (17, 512, 40), (63, 301, 40)],
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((65, 512, 33), (65, 255, 5))),
    ],
)
def test_integer_sums_are_exact(tokens: int, in_features: int, out_features: int, split: int) -> None:
    q, codes = random_codes(tokens, in_features), random_codes(out_features, in_features, seed=1)
    assert torch.equal(exact(q, codes, replace(SMALL, split=split)), reference.integer_product(q, codes))


@pytest.mark.parametrize(("tokens", "in_features", "split"), [(1, 256, 1), (17, 301, 2), (65, 512, 1), (70, 301, 2)])
def test_codes_of_8_bits(tokens: int, in_features: int, split: int) -> None:
    q, codes = random_codes(tokens, in_features, bits=8), random_codes(33, in_features, seed=1)
    q[0, :] = -128
    assert torch.equal(exact(q, codes, replace(SMALL, split=split), bits=8), reference.integer_product(q, codes))


@pytest.mark.parametrize(("groups", "weight_groups"), [(1, 1), (3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), [(0, 9, 8), (1, 3, 1), (17, 96, 40), (33, 303, 5)])
def test_weights_of_8_bits(tokens: int, in_features: int, out_features: int, groups: int, weight_groups: int) -> None:
    q, weight = random_codes(tokens, in_features, bits=8), random_codes(out_features, in_features, seed=1, bits=8)
    weight[0] = -128
    scale, weight_scale = torch.rand(tokens, groups) + 0.5, torch.rand(out_features, weight_groups) + 0.5
    bias, residual = torch.randn(out_features), torch.randn(tokens, out_features)
    rest = weight, weight_scale, bias, torch.float32
    found = kernels.linear_int(q, scale, *rest, 8, residual, tile=SMALL)
    expected = reference.linear_int(q, scale, *rest) + residual
    if groups == weight_groups == 1:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)


def test_neighbours_cover_every_tile() -> None:
    # More tiles of tokens than one stripe has, and a narrower last stripe.
    q, codes = random_codes(16 * (kernels.NEIGHBOURS + 2) + 1, 64), random_codes(70, 64, seed=1)
    assert torch.equal(exact(q, codes, SMALL), reference.integer_product(q, codes))


@pytest.mark.parametrize("tokens", [20, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("limit", BUCKETS)
def test_every_tile_of_the_rule(limit: int, tokens: int) -> None:
    q, codes = random_codes(tokens, 512), random_codes(70, 512, seed=1)
    assert torch.equal(exact(q, codes, start_tile(132, 70, 512, limit)), reference.integer_product(q, codes))


def test_extremes_fit_the_accumulator_and_the_operands() -> None:
    for tokens, bits in ((2, 4), (70, 4), (2, 8), (70, 8)):
        lowest = -(2 ** (bits - 1))
        q, codes = torch.full((tokens, 1024), lowest, dtype=torch.int8), torch.full((3, 1024), -8, dtype=torch.int8)
        expected = torch.full((tokens, 3), -8 * lowest * 1024, dtype=torch.int32)
        assert torch.equal(exact(q, codes, None, bits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("groups", "weight_groups"), [(1, 1), (3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("in_features", [96, 33])
def test_scales_and_bias(in_features: int, groups: int, weight_groups: int, dtype: torch.dtype) -> None:
    q, weight = random_codes(2, 9, in_features), pack_int4(random_codes(21, in_features, seed=1))
    scale, weight_scale = torch.rand(2, 9, groups) + 0.5, torch.rand(21, weight_groups) + 0.5
    bias = torch.rand(21).to(dtype)
    found = kernels.linear_int(q, scale, weight, weight_scale, bias, dtype, 8, tile=SMALL)
    expected = reference.linear_int(q, scale, weight, weight_scale, bias, dtype)
    # The interpreter truncates float32 to bfloat16 where hardware rounds: one unit in the last place.
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("tokens", [18, pytest.param(66, marks=pytest.mark.slow)])
def test_scaled_sums_bias_and_residual_have_the_bits_of_the_reference(tokens: int, split: int) -> None:
    q, weight = random_codes(2, tokens // 2, 512), pack_int4(random_codes(21, 512, seed=1))
    scale, weight_scale, bias = torch.rand(2, tokens // 2, 1), torch.rand(21, 1), torch.rand(21)
    for dtype in (torch.float32, torch.float16):
        residual = torch.randn(2, tokens // 2, 21).to(dtype)
        found = kernels.linear_int(
            q, scale, weight, weight_scale, bias, dtype, 4, residual, tile=replace(SMALL, split=split)
        )
        expected = reference.linear_int(q, scale, weight, weight_scale, bias, dtype) + residual
        assert torch.equal(found, expected)


def test_residual_with_groups() -> None:
    q, weight, residual = random_codes(5, 96), pack_int4(random_codes(7, 96, seed=1)), torch.randn(5, 7)
    scales = torch.rand(5, 3), torch.rand(7, 3)
    found = kernels.linear_int(q, scales[0], weight, scales[1], None, torch.float32, 4, residual, tile=SMALL)
    expected = reference.linear_int(q, scales[0], weight, scales[1], None, torch.float32) + residual
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_strided_operands(groups: int) -> None:
    q, scale = random_codes(96, 5).T, (torch.rand(10, groups) + 0.5)[::2]
    weight, weight_scale = pack_int4(random_codes(14, 96, seed=1))[::2], (torch.rand(groups, 7) + 0.5).T
    found = kernels.linear_int(q, scale, weight, weight_scale, None, torch.float32, 8, tile=SMALL)
    expected = reference.linear_int(q, scale, weight, weight_scale, None, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_prepared_activations() -> None:
    q = random_codes(5, 6)
    for factor in (1, 16):
        x, sums = kernels.prepare_activations(q, factor)
        assert torch.equal(x, torch.cat([q[:, :3] * factor, q[:, 3:]], 1))
        assert sums.tolist() == q[:, :3].sum(1).tolist()
