"""kv_read against a formula written out here, and as the inverse of kv_write to half a step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.kv_read import reference
from qpcompile.kernels.kv_read.op import OVERLOAD, kv_read
from qpcompile.kernels.kv_write.op import kv_write
from qpcompile.kernels.kv_write.reference import pack_planes

bits_of_codes = pytest.mark.parametrize("bits", [4, 8])
SHAPES = [(1, 1, 1, 1), (1, 2, 17, 7), (2, 3, 63, 33), (2, 1, 257, 64)]


def test_by_hand() -> None:
    codes = torch.tensor([[[[0 | 10 << 4, 5 | 15 << 4], [3 | 7 << 4, 0 | 1 << 4]]]], dtype=torch.uint8)
    affine = torch.tensor([[[[0.5, 0.0], [2.0, 3.0]]]])
    expected = torch.tensor([[[[0.0, 2.5, 5.0, 7.5], [0.0, -6.0, 8.0, -4.0]]]])
    assert torch.equal(kv_read(codes, affine, 4, 4, torch.float32), expected)
    assert torch.equal(kv_read(codes, affine, 3, 4, torch.float32), expected[..., :3])
    # As codes of 8 bits, they are the bytes themselves.
    wide = torch.tensor([[[[160 * 0.5, 245 * 0.5], [(115 - 3) * 2.0, (16 - 3) * 2.0]]]])
    assert torch.equal(kv_read(codes, affine, 2, 8, torch.float32), wide)


@bits_of_codes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
    codes, affine = kv_write(torch.randn(shape), bits)
    expected = reference.kv_read(codes, affine, shape[-1], bits, dtype)
    got = kv_read(codes, affine, shape[-1], bits, dtype)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, expected)


@bits_of_codes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loses_half_a_step_at_most(shape: tuple[int, ...], bits: int) -> None:
    x = torch.randn(shape) * 10 + 3
    codes, affine = kv_write(x, bits)
    error = (kv_read(codes, affine, shape[-1], bits, torch.float32) - x).abs()
    assert (error <= 0.5001 * affine[..., :1]).all()


def test_8_bits_are_finer_than_4() -> None:
    x = torch.randn(1, 2, 9, 24)
    coarse, fine = (kv_read(*kv_write(x, bits), 24, bits, torch.float32) for bits in (4, 8))
    assert (fine - x).norm() * 10 < (coarse - x).norm()


@bits_of_codes
def test_writing_what_was_read_changes_nothing(bits: int) -> None:
    codes, affine = kv_write(torch.randn(2, 3, 17, 9), bits)
    read = kv_read(codes, affine, 9, bits, torch.float32)
    assert torch.allclose(kv_read(*kv_write(read, bits), 9, bits, torch.float32), read, rtol=1e-6, atol=1e-5)


@bits_of_codes
def test_zero_row_reads_zero(bits: int) -> None:
    assert not kv_read(*kv_write(torch.zeros(1, 2, 3, 5), bits), 5, bits, torch.float32).any()


@bits_of_codes
def test_not_contiguous(bits: int) -> None:
    codes, affine = kv_write(torch.randn(2, 6, 8, 5), bits)
    for part in (slice(None, None, 2), slice(1, 4)):
        views = codes.transpose(1, 2)[:, part], affine.transpose(1, 2)[:, part]
        expected = reference.kv_read(views[0].contiguous(), views[1].contiguous(), 5, bits, torch.float32)
        assert torch.equal(kv_read(*views, 5, bits, torch.float32), expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_unpacking_inverts_packing(codes: list[int]) -> None:
    packed = pack_planes(torch.tensor(codes, dtype=torch.uint8))
    assert reference.unpack_planes(packed, len(codes)).tolist() == codes


def test_opcheck() -> None:
    for bits, dtype in ((4, torch.float32), (8, torch.bfloat16)):
        torch.library.opcheck(kv_read, (*kv_write(torch.randn(2, 3, 5, 7), bits), 7, bits, dtype))
        codes, affine = (part.transpose(1, 2) for part in kv_write(torch.randn(2, 3, 6, 6), bits))
        torch.library.opcheck(kv_read, (codes, affine, 6, bits, torch.float32))


def test_refuses_a_cache_of_another_head_size() -> None:
    codes, affine = kv_write(torch.randn(1, 2, 3, 8), 4)
    with pytest.raises(KernelError, match=r"bytes\(head_dim, bits\) is 3 and not 4"):
        kv_read(codes, affine, 6, 4, torch.float32)
    with pytest.raises(KernelError, match=r"bytes\(head_dim, bits\) is 8 and not 4"):
        kv_read(codes, affine, 8, 8, torch.float32)
    with pytest.raises(KernelError, match="affine is bf16"):
        kv_read(codes, affine.bfloat16(), 8, 4, torch.float32)


class Read(torch.nn.Module):
    """Codes and scales stored [B, S, H, ...]."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, codes: Tensor, affine: Tensor) -> tuple[Tensor, ...]:
        cache = codes.transpose(1, 2), affine.transpose(1, 2)
        return tuple(kv_read(*cache, 7, self.bits, dtype) for dtype in (torch.float32, torch.float16))


@bits_of_codes
def test_onnx_is_bit_exact(export_onnx: Callable[..., Any], bits: int) -> None:
    from qpcompile.kernels.kv_read.onnx import kv_read as translation

    def stored(batch: int, length: int) -> list[Tensor]:
        return [part.transpose(1, 2).contiguous() for part in kv_write(torch.randn(batch, 3, length, 7), bits)]

    exported = export_onnx(Read(bits), stored(2, 9), {OVERLOAD: translation})
    for batch, length in ((1, 1), (3, 17), (2, 257)):
        cache = stored(batch, length)
        assert all(map(torch.equal, Read(bits)(*cache), exported(*cache)))
