"""Cases for silu_mul_quantize's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from kernels.code_agreement import assert_codes_agree

from qpcompile.kernels.hadamard.reference import transform
from qpcompile.kernels.silu_mul_quantize import reference
from qpcompile.kernels.silu_mul_quantize import triton as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("scaled", "rotate"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("tokens", "channels", "group_size"), [(0, 96, 0), (1, 63, 0), (17, 96, 0), (5, 96, 32), (3, 344, 0), (3, 1280, 0)]
)
def test_codes_are_the_references(
    tokens: int, channels: int, group_size: int, scaled: bool, rotate: bool, dtype: torch.dtype
) -> None:
    gate, up = (torch.randn(tokens, channels) * 5).to(dtype), torch.randn(tokens, channels).to(dtype)
    gate[:1] = 0
    scale = torch.rand(channels) + 0.5 if scaled else None
    found = kernels.silu_mul_quantize(gate, up, scale, rotate, group_size, 0.9)
    expected = reference.silu_mul_quantize(gate, up, scale, rotate, group_size, 0.9)
    assert_codes_agree(found, expected, transform(reference.silu_mul(gate, up), scale, rotate))


@pytest.mark.parametrize("channels", [11008, 18944])
def test_widths_of_models(channels: int) -> None:
    gate, up = torch.randn(2, channels), torch.randn(2, channels)
    found = kernels.silu_mul_quantize(gate, up, None, True, 0, 1.0)
    expected = reference.silu_mul_quantize(gate, up, None, True, 0, 1.0)
    assert_codes_agree(found, expected, transform(reference.silu_mul(gate, up), None, True))


def test_far_ends_of_the_gate() -> None:
    gate = torch.tensor([[-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4]])
    up = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 0.06, 0.0007]])
    found = kernels.silu_mul_quantize(gate, up, None, False, 0, 1.0)
    expected = reference.silu_mul_quantize(gate, up, None, False, 0, 1.0)
    assert_codes_agree(found, expected, reference.silu_mul(gate, up))


@pytest.mark.parametrize("rotate", [False, True])
def test_a_poisoned_token_stays_alone(rotate: bool) -> None:
    gate = torch.ones(18, 63)
    gate[1, 2] = torch.nan
    found = kernels.silu_mul_quantize(gate, torch.ones(18, 63), None, rotate, 0, 1.0)[1]
    assert found.isnan().flatten().nonzero().flatten().tolist() == [1]
