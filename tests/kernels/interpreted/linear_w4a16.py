"""Cases for linear_w4a16's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file.

The interpreter multiplies bfloat16 wrongly: that type's products are tested on a GPU only (tests/kernels/gpu).
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.linear_int.packing import pack_int4
from qpcompile.kernels.linear_int.tuning import Tile
from qpcompile.kernels.linear_w4a16 import reference
from qpcompile.kernels.linear_w4a16 import triton as kernels

SMALL = Tile(out=32, tokens=16, step=64, warps=4, stages=2)


def operands(tokens: int, in_features: int, out_features: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x: f16[T, K], weight: u8[N, K/2], weight_scale: f32[N, groups]."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8, generator=generator)
    x = torch.randn(tokens, in_features, generator=generator).half()
    return x, pack_int4(codes), torch.rand(out_features, groups, generator=generator) / 8 + 0.01


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "out_features"), [(0, 8), (1, 33), (5, 64), (17, 70), (65, 5)])
def test_kernel_is_the_reference(tokens: int, out_features: int, groups: int, split: int) -> None:
    x, weight, scale = operands(tokens, 512, out_features, groups)
    bias = torch.randn(out_features).half()
    found = kernels.linear_w4a16(x, weight, scale, bias, replace(SMALL, split=split))
    expected = reference.linear_w4a16(x, weight, scale, bias)
    # float32 sums in a different summation order, then one rounding to float16.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_every_code_is_exact() -> None:
    # With the identity as activations the result is the weight: all 16 codes in both planes.
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(16)[None].repeat(3, 1)
    weight, scale = pack_int4(codes), torch.ones(3, 1)
    found = kernels.linear_w4a16(torch.eye(256).half(), weight, scale, None, SMALL)
    assert torch.equal(found.T, codes.half())


@pytest.mark.parametrize("tile", [kernels.SHAPES[16], kernels.SHAPES[256]], ids=str)
def test_tiles(tile: Tile) -> None:
    x, weight, scale = operands(20, 256, 70, 1)
    found = kernels.linear_w4a16(x, weight, scale, None, tile)
    torch.testing.assert_close(found, reference.linear_w4a16(x, weight, scale, None), rtol=1e-3, atol=2e-3)


def test_what_the_kernel_takes() -> None:
    half = torch.zeros(1, 512, dtype=torch.float16)
    assert kernels.takes(half, torch.ones(7, 1)) and kernels.takes(half.bfloat16(), torch.ones(7, 4))
    assert not kernels.takes(half.float(), torch.ones(7, 1))
    assert not kernels.takes(half, torch.ones(7, 8))
    assert not kernels.takes(half[:, :128], torch.ones(7, 1))
