"""Cases for linear_w8a16's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file.

The interpreter multiplies bfloat16 wrongly: that type's products are tested on a GPU only (tests/kernels/gpu).
"""

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.linear_int.tuning import Tile
from qpcompile.kernels.linear_w8a16 import reference
from qpcompile.kernels.linear_w8a16 import triton as kernels

SMALL = Tile(out=32, tokens=16, step=64, warps=4, stages=2)


def operands(tokens: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """x: f16[T, K], codes: i8[N, K], scale: f32[N, 1]."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, in_features, generator=made).half()
    return x, *reference.quantize_rows(torch.randn(out_features, in_features, generator=made))


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("tokens", "out_features"), [(0, 8), (1, 33), (5, 64), (17, 70), (65, 5)])
def test_kernel_is_the_reference(tokens: int, out_features: int, biased: bool) -> None:
    x, codes, scale = operands(tokens, 192, out_features)
    bias = torch.randn(out_features).half() if biased else None
    found = kernels.linear_w8a16(x, codes, scale, bias, SMALL)
    # float32 sums in a different summation order, then one rounding to float16.
    torch.testing.assert_close(found, reference.linear_w8a16(x, codes, scale, bias), rtol=1e-3, atol=2e-3)


def test_every_code_is_exact() -> None:
    # With the identity as activations the result is the weight.
    codes = torch.arange(-128, 128).to(torch.int8)[None].repeat(3, 1)
    found = kernels.linear_w8a16(torch.eye(256).half(), codes, torch.ones(3, 1), None, SMALL)
    assert torch.equal(found.T, codes.half())


@pytest.mark.parametrize("tile", kernels.SHAPES.values(), ids=str)
def test_tiles(tile: Tile) -> None:
    x, codes, scale = operands(20, 128, 70)
    found = kernels.linear_w8a16(x, codes, scale, None, tile)
    torch.testing.assert_close(found, reference.linear_w8a16(x, codes, scale, None), rtol=1e-3, atol=2e-3)


def test_what_the_kernel_takes() -> None:
    half = torch.zeros(1, 192, dtype=torch.float16)
    assert kernels.takes(half) and kernels.takes(half.bfloat16())
    assert not kernels.takes(half.float()) and not kernels.takes(half[:, :100])
