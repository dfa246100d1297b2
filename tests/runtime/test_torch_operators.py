"""Faster implementations of torch's operators equal torch's results."""

import pytest
import torch
import torch.nn.functional as F

from qpcompile.runtime.cpu.torch_operators import conv2d, conv3d, linear


@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 1, 7), (2, 3, 7), (0, 3, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(size).to(dtype) for size in (shape, (5, 7), (5,)))
    for given in (None, bias):
        torch.testing.assert_close(linear(x, weight, given), F.linear(x, weight, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_patches_are_rows(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((6, 3, 2, 4, 4), (5, 3, 2, 4, 4), (5,)))
    found = conv3d(x, weight, bias, [2, 4, 4])
    assert found.shape == (6, 5, 1, 1, 1)
    torch.testing.assert_close(found, F.conv3d(x, weight, bias, [2, 4, 4]))
    torch.testing.assert_close(conv2d(x[:, :, 0], weight[:, :, 0]), F.conv2d(x[:, :, 0], weight[:, :, 0]))


@pytest.mark.parametrize("options", [([4, 4],), ([1, 1], [2, 2]), ([1, 1], "same"), ([1, 1], 0, [2, 2])], ids=str)
def test_other_convolutions_are_torchs(options: tuple[object, ...]) -> None:
    x, weight = torch.randn(2, 3, 12, 12), torch.randn(5, 3, 4, 4)
    assert torch.equal(conv2d(x, weight, None, *options), F.conv2d(x, weight, None, *options))  # type: ignore[arg-type]
    same = torch.randn(2, 3, 4, 4)
    assert torch.equal(conv2d(same, weight, None, [1, 1], [2, 2]), F.conv2d(same, weight, None, [1, 1], [2, 2]))
