"""Cases for rmsnorm_quantize's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from kernels.code_agreement import assert_codes_agree

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.rmsnorm_quantize import reference
from qpcompile.kernels.rmsnorm_quantize import triton as kernels

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("scaled", "rotate"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("tokens", "channels", "group_size"), [(0, 96, 0), (1, 63, 0), (17, 96, 0), (5, 96, 32), (3, 344, 0), (3, 1280, 0)]
)
def test_codes_are_the_references(
    tokens: int, channels: int, group_size: int, scaled: bool, rotate: bool, dtype: torch.dtype
) -> None:
    x, weight = (torch.randn(tokens, channels) * 5).to(dtype), torch.randn(channels).to(dtype)
    x[:1] = 0
    scale = torch.rand(channels) + 0.5 if scaled else None
    found = kernels.norm_quantize(x, weight, None, EPS, scale, rotate, group_size, 0.9)
    expected = reference.rmsnorm_quantize(x, weight, EPS, scale, rotate, group_size, 0.9)
    assert_codes_agree(found, expected, transform(reference.rmsnorm(x, weight, EPS), scale, rotate))


@pytest.mark.parametrize("channels", [4096, 18944])
def test_widths_of_models(channels: int) -> None:
    x, weight = torch.randn(2, channels), torch.randn(channels)
    found = kernels.norm_quantize(x, weight, None, EPS, None, True, 0, 1.0)
    expected = reference.rmsnorm_quantize(x, weight, EPS, None, True, 0, 1.0)
    assert_codes_agree(found, expected, transform(reference.rmsnorm(x, weight, EPS), None, True))


@pytest.mark.parametrize("rotate", [False, True])
def test_a_poisoned_token_stays_alone(rotate: bool) -> None:
    x = torch.ones(18, 63)
    x[1, 2] = torch.nan
    found = kernels.norm_quantize(x, torch.ones(63), None, EPS, None, rotate, 0, 1.0)[1]
    assert found.isnan().flatten().nonzero().flatten().tolist() == [1]


def test_strided() -> None:
    x, weight = torch.randn(96, 5, 2).transpose(0, 2), torch.randn(192)[::2]
    found = kernels.norm_quantize(x, weight, None, EPS, None, True, 0, 1.0)
    expected = reference.rmsnorm_quantize(x, weight, EPS, None, True, 0, 1.0)
    assert_codes_agree(found, expected, transform(reference.rmsnorm(x, weight, EPS), None, True))
