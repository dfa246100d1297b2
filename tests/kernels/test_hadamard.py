"""qpcompile::hadamard: orthogonal for every width, equal to its matrix, one result for a token in any batch, ONNX."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.hadamard import onnx as translation
from qpcompile.kernels.hadamard import op, reference

WIDTHS = [1, 2, 3, 12, 17, 63, 96, 144, 192, 768, 896, 1152]


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
    expected = [[5.0, -1.0, -2.0, 0.0], [0.5, 0.5, 0.5, 0.5]]
    assert reference.hadamard(x).tolist() == expected
    scaled = reference.hadamard(torch.ones(2, 4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert scaled.tolist() == [expected[0], expected[0]]


def test_three_channels_are_a_cosine_transform() -> None:
    third, half, sixth = 1 / np.sqrt(3), 1 / np.sqrt(2), 1 / np.sqrt(6)
    expected = torch.tensor([[third, third, third], [half, 0, -half], [sixth, -2 * sixth, sixth]], dtype=torch.float64)
    torch.testing.assert_close(reference.hadamard_matrix(3), expected, rtol=0, atol=1e-15)


def test_six_channels_are_a_kronecker_product() -> None:
    dct = reference.hadamard_matrix(3) / np.sqrt(2)
    expected = torch.cat([torch.cat([dct, dct], 1), torch.cat([dct, -dct], 1)])
    torch.testing.assert_close(reference.hadamard_matrix(6), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("channels", WIDTHS)
def test_matrix_is_orthogonal(channels: int) -> None:
    matrix = reference.hadamard_matrix(channels)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_op_is_the_matrix(tokens: int, channels: int) -> None:
    x, scale = torch.randn(2, tokens, channels), torch.rand(channels) + 0.5
    found = torch.ops.qpcompile.hadamard(x, scale)
    expected = (x.double() * scale) @ reference.hadamard_matrix(channels).T
    # Float32 sums of up to 1152 terms of size 1.
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rotated_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(5, 96).to(dtype)
    found = torch.ops.qpcompile.hadamard(x, None)
    assert found.dtype == dtype
    expected = torch.ops.qpcompile.hadamard(x.float(), None).to(dtype)
    # On AMX tiles a sum next to a tie may round the other way.
    assert (found - expected).abs().le(expected.abs() * torch.finfo(dtype).eps).all()
    assert (found == expected).float().mean() > 0.95


@pytest.mark.parametrize("channels", [128, 144, 192, 896, 2816, 11008])
def test_a_token_is_the_same_in_every_batch(channels: int) -> None:
    x = torch.randn(33, channels)
    together = torch.ops.qpcompile.hadamard(x, None)
    alone = torch.cat([torch.ops.qpcompile.hadamard(each, None) for each in x.split(1)])
    assert torch.equal(together, alone)


def test_spreads_an_outlier() -> None:
    x = torch.randn(8, 768)
    x[:, 5] = 100
    assert torch.ops.qpcompile.hadamard(x, None).abs().amax() < 12


def test_output_never_is_the_input() -> None:
    x = torch.ones(3, 1)
    torch.ops.qpcompile.hadamard(x, None).fill_(7)
    assert torch.equal(x, torch.ones(3, 1))


def test_non_contiguous() -> None:
    x = torch.randn(48, 5, 2).transpose(0, 2)
    assert torch.equal(torch.ops.qpcompile.hadamard(x, None), torch.ops.qpcompile.hadamard(x.contiguous(), None))


def test_refuses_no_channels() -> None:
    with pytest.raises(KernelError, match="0 channels"):
        reference.hadamard_matrix(0)


@pytest.mark.parametrize("channels", [1, 12])
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(channels: int, scaled: bool) -> None:
    torch.library.opcheck(op.hadamard, (torch.randn(2, 3, channels), torch.ones(channels) if scaled else None))


class Rotations(torch.nn.Module):
    """With and without a scale, in float and in half, and a width without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(144) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rotate = torch.ops.qpcompile.hadamard
        return rotate(x, self.scale), rotate(x.half(), None), rotate(x[..., :17], None)


def test_onnx_is_the_op(export_onnx: Any) -> None:
    module = Rotations()
    exported = export_onnx(module, [torch.randn(2, 5, 144)], {op.OVERLOAD: translation.hadamard})
    assert not any("::" in each for each in exported.operators)
    for shape in ((1, 1, 144), (3, 17, 144)):
        x = torch.randn(shape)
        full, half, odd = exported(x)
        expected = module(x)
        torch.testing.assert_close(full, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(half, expected[1], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(odd, expected[2], rtol=1e-5, atol=1e-5)


def test_a_rotation_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(KernelError, match="a matrix of 16411 columns"):
        reference.factor_arrays(16411)  # a prime: no power of two to factor out
    with pytest.raises(KernelError, match="a rotation of 281474976710656 channels"):
        reference.factor_arrays(2**48)
