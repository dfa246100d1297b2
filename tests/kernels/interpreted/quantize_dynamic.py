"""Cases for quantize_dynamic's Triton kernel under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch

from qpcompile.kernels.quantize_dynamic import reference
from qpcompile.kernels.quantize_dynamic import triton as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "channels", "group_size"), [(0, 4, 0), (1, 1, 0), (17, 63, 0), (5, 63, 9), (5, 768, 0), (3, 256, 32)]
)
def test_kernel_is_the_reference(tokens: int, channels: int, group_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:1] = 0
    for bits in (4, 8):
        q, scale = kernels.quantize_dynamic(x, group_size, 0.9, bits)
        expected_q, expected_scale = reference.quantize_dynamic(x, group_size, 0.9, bits)
        assert torch.equal(q, expected_q)
        assert torch.equal(scale, expected_scale)


def test_ties_saturation_and_tiny_values() -> None:
    x = torch.tensor([[14.0, -14.0, 1.0, 3.0, 5.0], [7.0, 0.5, 1.5, 2.5, -0.5], [1e-38, 3e-39, 0.0, 0.0, 0.0]])
    for clip_ratio in (1.0, 0.5):
        q, scale = kernels.quantize_dynamic(x, 0, clip_ratio, 4)
        expected_q, expected_scale = reference.quantize_dynamic(x, 0, clip_ratio)
        assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)


def test_a_poisoned_token_stays_poisoned() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    assert kernels.quantize_dynamic(x, 0, 1.0, 4)[1].isnan().flatten().tolist() == [False, True, False]


def test_strided() -> None:
    x = torch.randn(12, 5, 2).transpose(0, 2)
    q, scale = kernels.quantize_dynamic(x, 3, 1.0, 4)
    expected_q, expected_scale = reference.quantize_dynamic(x, 3, 1.0)
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)
