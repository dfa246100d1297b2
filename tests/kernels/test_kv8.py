"""kv8_write and kv8_read: half a step at most, token by token, and through ONNX."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qpcompile.errors import KernelError
from qpcompile.kernels.kv4_read.op import kv4_read
from qpcompile.kernels.kv4_write.op import kv4_write
from qpcompile.kernels.kv8_read import op as read_op
from qpcompile.kernels.kv8_read.onnx import kv8_read as read_translation
from qpcompile.kernels.kv8_read.op import kv8_read
from qpcompile.kernels.kv8_write import op as write_op
from qpcompile.kernels.kv8_write.onnx import kv8_write as write_translation
from qpcompile.kernels.kv8_write.op import kv8_write

SHAPES = [(1, 1, 1, 1), (1, 2, 17, 7), (2, 3, 63, 33), (2, 1, 0, 24)]


def made(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_by_hand() -> None:
    codes, affine = kv8_write(torch.tensor([[[[-1.0, 0.0, 1.55]]]]))
    assert affine.flatten().tolist() == pytest.approx([0.01, 100.0])
    assert codes.flatten().tolist() == [0, 100, 255]
    assert kv8_read(codes, affine, torch.float32).flatten().tolist() == pytest.approx([-1.0, 0.0, 1.55])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loses_half_a_step_at_most(shape: tuple[int, ...]) -> None:
    x = made(*shape) * 10 + 3
    codes, affine = kv8_write(x)
    error = (kv8_read(codes, affine, torch.float32) - x).abs()
    assert (error <= 0.5001 * affine[..., :1]).all()


def test_is_finer_than_four_bits() -> None:
    x = made(1, 2, 9, 24)
    coarse = kv4_read(*kv4_write(x), 24, torch.float32)
    fine = kv8_read(*kv8_write(x), torch.float32)
    assert (fine - x).norm() * 10 < (coarse - x).norm()


def test_tokens_do_not_see_each_other() -> None:
    x = made(2, 3, 8, 5)
    codes, affine = kv8_write(x)
    for whole, part in zip((codes, affine), kv8_write(x[:, :, ::2]), strict=True):
        assert torch.equal(whole[:, :, ::2], part)


def test_zero_row_reads_zero() -> None:
    assert not kv8_read(*kv8_write(torch.zeros(1, 2, 3, 5)), torch.float32).any()


def test_refusals() -> None:
    with pytest.raises(KernelError, match=r"x is f32\[2, 3\]"):
        kv8_write(torch.ones(2, 3))
    with pytest.raises(KernelError, match="codes is f32"):
        kv8_read(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 2), torch.float32)


def test_operators_are_well_formed() -> None:
    x = made(1, 2, 3, 5)
    torch.library.opcheck(write_op.OVERLOAD, (x,))
    torch.library.opcheck(read_op.OVERLOAD, (*kv8_write(x), torch.float32))


def test_onnx(export_onnx: Callable[..., Any]) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            codes, affine = torch.ops.qpcompile.kv8_write(x.transpose(1, 2))
            return codes, affine, torch.ops.qpcompile.kv8_read(codes, affine, torch.float32)

    table = {write_op.OVERLOAD: write_translation, read_op.OVERLOAD: read_translation}
    x = made(2, 7, 3, 5)
    exported = export_onnx(Model(), [x], table)
    for got, expected in zip(exported(x), Model()(x), strict=True):
        assert torch.equal(got, expected)
