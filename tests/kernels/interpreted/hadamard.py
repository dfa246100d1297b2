"""Cases for hadamard's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file."""

from typing import Any

import numpy as np
import pytest
import torch

from qpcompile.kernels.hadamard import reference
from qpcompile.kernels.hadamard import triton as kernels

# Two halves, three factors, an odd factor, padding, several tokens in a program, one column, a tile just not full.
WIDTHS = [18944, 11008, 4096, 3584, 1280, 1152, 1024, 768, 144, 128, 127, 96, 63, 12, 1]


def rotated(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    tiling = kernels.rotated_tiling(x.shape[-1])
    assert tiling is not None
    return kernels.hadamard(x, scale, tiling)


@pytest.mark.parametrize("channels", WIDTHS)
def test_kernel_is_the_reference(channels: int) -> None:
    x, scale = torch.randn(2, 3, channels) * 3, torch.rand(channels) + 0.5
    # Float32 sums against the reference's float64, of values of size 3.
    torch.testing.assert_close(rotated(x, scale), reference.hadamard(x, scale), rtol=0, atol=2e-5)


@pytest.mark.parametrize("channels", [96, 1024, 11008, 18944])
def test_two_pieces_of_tf32_are_float32(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    # The interpreter multiplies in float32; tensor cores read 10 mantissa bits of each operand.
    exact: Any = InterpreterBuilder.create_dot

    def cut(operand: Any) -> Any:
        operand.data = (operand.data.view(np.int32) & -(1 << 13)).view(np.float32)
        return operand

    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda own, a, b, *rest: exact(own, cut(a), cut(b), *rest))
    x = torch.randn(3, channels)
    expected = reference.hadamard(x)
    error = (rotated(x, None) - expected).abs().max() / expected.abs().max()
    assert error < 2e-6
    assert (expected - (expected.view(torch.int32) & -(1 << 13)).view(torch.float32)).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype: torch.dtype) -> None:
    x = torch.randn(5, 96).to(dtype)
    found, expected = rotated(x, None), reference.hadamard(x)
    assert found.dtype == dtype
    # The interpreter truncates float32 to bfloat16 where hardware rounds.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("channels", [63, 96, 4096])
def test_a_poisoned_token_stays_alone(channels: int) -> None:
    x = torch.ones(18, channels)
    x[1, 2] = torch.nan
    assert rotated(x, None).isnan().any(1).nonzero().flatten().tolist() == [1]


def test_empty_and_strided() -> None:
    assert rotated(torch.empty(0, 96), None).shape == (0, 96)
    x = torch.randn(96, 5, 2).transpose(0, 2)
    torch.testing.assert_close(rotated(x, None), reference.hadamard(x), rtol=0, atol=1e-5)


def test_widths_without_a_tile() -> None:
    assert [kernels.rotated_tiling(channels) for channels in (3420, 4304, 344, 1 << 16)] == [None] * 4
