"""kv4_read against a formula written out here, and as the inverse of kv4_write to half a step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.kv4_read import reference
from qpcompile.kernels.kv4_read.op import OVERLOAD, kv4_read
from qpcompile.kernels.kv4_write.op import kv4_write
from qpcompile.kernels.kv4_write.reference import pack_planes

SHAPES = [(1, 1, 1, 1), (1, 2, 17, 7), (2, 3, 63, 33), (2, 1, 257, 64)]


def test_by_hand() -> None:
    codes = torch.tensor([[[[0 | 10 << 4, 5 | 15 << 4], [3 | 7 << 4, 0 | 1 << 4]]]], dtype=torch.uint8)
    affine = torch.tensor([[[[0.5, 0.0], [2.0, 3.0]]]])
    expected = torch.tensor([[[[0.0, 2.5, 5.0, 7.5], [0.0, -6.0, 8.0, -4.0]]]])
    assert torch.equal(kv4_read(codes, affine, 4, torch.float32), expected)
    assert torch.equal(kv4_read(codes, affine, 3, torch.float32), expected[..., :3])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes, affine = kv4_write(torch.randn(shape))
    expected = reference.kv4_read(codes, affine, shape[-1], dtype)
    got = kv4_read(codes, affine, shape[-1], dtype)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loses_half_a_step_at_most(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 10 + 3
    codes, affine = kv4_write(x)
    error = (kv4_read(codes, affine, shape[-1], torch.float32) - x).abs()
    assert (error <= 0.5001 * affine[..., :1]).all()


def test_writing_what_was_read_changes_nothing() -> None:
    codes, affine = kv4_write(torch.randn(2, 3, 17, 9))
    read = kv4_read(codes, affine, 9, torch.float32)
    assert torch.allclose(kv4_read(*kv4_write(read), 9, torch.float32), read, rtol=1e-6, atol=1e-6)


def test_zero_row_reads_zero() -> None:
    assert not kv4_read(*kv4_write(torch.zeros(1, 2, 3, 5)), 5, torch.float32).any()


def test_not_contiguous() -> None:
    codes, affine = kv4_write(torch.randn(2, 6, 8, 5))
    for part in (slice(None, None, 2), slice(1, 4)):
        views = codes.transpose(1, 2)[:, part], affine.transpose(1, 2)[:, part]
        expected = reference.kv4_read(views[0].contiguous(), views[1].contiguous(), 5, torch.float32)
        assert torch.equal(kv4_read(*views, 5, torch.float32), expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_unpacking_inverts_packing(codes: list[int]) -> None:
    packed = pack_planes(torch.tensor(codes, dtype=torch.uint8))
    assert reference.unpack_planes(packed, len(codes)).tolist() == codes


def test_opcheck() -> None:
    cache = kv4_write(torch.randn(2, 3, 5, 7))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(kv4_read, (*cache, 7, dtype))
    codes, affine = kv4_write(torch.randn(2, 3, 6, 6))
    torch.library.opcheck(kv4_read, (codes.transpose(1, 2), affine.transpose(1, 2), 6, torch.float32))


def test_refuses_a_cache_of_another_head_size() -> None:
    codes, affine = kv4_write(torch.randn(1, 2, 3, 8))
    with pytest.raises(KernelError, match=r"ceil\(head_dim/2\) is 3 and not 4"):
        kv4_read(codes, affine, 6, torch.float32)
    with pytest.raises(KernelError, match="affine is bf16"):
        kv4_read(codes, affine.bfloat16(), 8, torch.float32)


class Read(torch.nn.Module):
    """Codes and scales stored [B, S, H, ...]."""

    def forward(self, codes: Tensor, affine: Tensor) -> tuple[Tensor, ...]:
        cache = codes.transpose(1, 2), affine.transpose(1, 2)
        return tuple(kv4_read(*cache, 7, dtype) for dtype in (torch.float32, torch.float16))


def test_onnx_is_bit_exact(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.kv4_read.onnx import kv4_read as translation

    def stored(batch: int, length: int) -> list[Tensor]:
        return [part.transpose(1, 2).contiguous() for part in kv4_write(torch.randn(batch, 3, length, 7))]

    exported = export_onnx(Read(), stored(2, 9), {OVERLOAD: translation})
    for batch, length in ((1, 1), (3, 17), (2, 257)):
        cache = stored(batch, length)
        assert all(map(torch.equal, Read()(*cache), exported(*cache)))
