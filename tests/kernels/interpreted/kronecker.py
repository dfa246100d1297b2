"""Cases for kronecker's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from kernels.code_agreement import assert_codes_agree

from qpcompile.kernels.kronecker import reference
from qpcompile.kernels.kronecker import triton as kernels
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.kernels.transform_quantize.triton import transform_quantize

# Sizes that are not powers of two, one column, an exactly full tile, and one that goes through memory.
SIDES = [(3, 5), (1, 7), (16, 16), (24, 32), (64, 64), (128, 86), (128, 148)]


def factors(left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(left, left) / left**0.5, torch.randn(right, right) / right**0.5


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("left", "right"), SIDES)
def test_values_are_the_references(left: int, right: int, scaled: bool) -> None:
    x, both = torch.randn(2, 3, left * right), factors(left, right)
    scale = torch.rand(left * right) + 0.5 if scaled else None
    # Float32 sums against the reference's float64.
    torch.testing.assert_close(
        kernels.kronecker(x, scale, *both), reference.kronecker(x, scale, *both), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("left", "right", "group_size"), [(24, 32, 0), (24, 32, 96), (128, 148, 0)])
def test_codes_are_the_references(left: int, right: int, group_size: int, dtype: torch.dtype) -> None:
    x, both = (torch.randn(5, left * right) * 3).to(dtype), factors(left, right)
    x[:1] = 0
    values = reference.kronecker(x.float(), None, *both)
    found = transform_quantize(x, None, False, *both, None, group_size, 0.9, 4)
    assert_codes_agree(found, quantize_dynamic(values, group_size, 0.9, 4), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype: torch.dtype) -> None:
    x, both = torch.randn(5, 96).to(dtype), factors(8, 12)
    found = kernels.kronecker(x, None, *both)
    assert found.dtype == dtype
    # The interpreter truncates float32 to bfloat16 where hardware rounds.
    torch.testing.assert_close(found, reference.kronecker(x, None, *both), rtol=2**-7, atol=1e-3)


def test_a_poisoned_token_stays_alone() -> None:
    x, both = torch.ones(18, 63), factors(7, 9)
    x[1, 2] = torch.nan
    assert kernels.kronecker(x, None, *both).isnan().any(1).nonzero().flatten().tolist() == [1]


def test_empty_and_strided() -> None:
    both = factors(8, 12)
    assert kernels.kronecker(torch.empty(0, 96), None, *both).shape == (0, 96)
    x = torch.randn(96, 5, 2).transpose(0, 2)
    torch.testing.assert_close(
        kernels.kronecker(x, None, *both), reference.kronecker(x, None, *both), rtol=0, atol=1e-5
    )
