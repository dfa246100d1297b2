"""Cases for layernorm_quantize's kernel under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from kernels.code_agreement import assert_codes_agree

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.layernorm_quantize import reference
from qpcompile.kernels.layernorm_quantize import triton as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scaled", "rotate"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("tokens", "channels", "group_size"), [(0, 96, 0), (1, 63, 0), (17, 96, 0), (5, 96, 32), (3, 344, 0), (3, 1280, 0)]
)
def test_codes_are_the_references(
    tokens: int, channels: int, group_size: int, scaled: bool, rotate: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(tokens, channels) * 5 + 1).to(dtype)
    weight, bias = torch.randn(2, channels).to(dtype)
    scale = torch.rand(channels) + 0.5 if scaled else None
    found = kernels.layernorm_quantize(x, weight, bias, 1e-5, scale, rotate, group_size, 0.9)
    expected = reference.layernorm_quantize(x, weight, bias, 1e-5, scale, rotate, group_size, 0.9)
    assert_codes_agree(found, expected, transform(reference.layernorm(x, weight, bias, 1e-5), scale, rotate))


def test_a_constant_token_is_its_bias() -> None:
    bias = torch.arange(7.0)[None]
    q, scale = kernels.layernorm_quantize(torch.full((3, 7), 5.0), torch.ones(7), bias[0], 1e-5, None, False, 0, 1.0)
    assert torch.equal(q * scale, (bias / (6 / 7)).round() * (6 / 7) * torch.ones(3, 1))


def test_a_poisoned_token_stays_alone() -> None:
    x = torch.randn(18, 63)
    x[1, 2] = torch.nan
    found = kernels.layernorm_quantize(x, torch.ones(63), torch.ones(63), 1e-5, None, True, 0, 1.0)[1]
    assert found.isnan().flatten().nonzero().flatten().tolist() == [1]
