"""kv_write against a formula written out here, its packing, and its independence of other tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.kv_write.op import OVERLOAD, kv_write
from qpcompile.kernels.kv_write.reference import pack_planes

SHAPES = [(1, 1, 1, 1), (1, 2, 17, 7), (2, 3, 63, 33), (2, 1, 257, 64), (1, 4, 5, 80)]


bits_of_codes = pytest.mark.parametrize("bits", [4, 8])


def naive(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """x: f32[B, H, S, D], one token and head at a time, code by code."""
    width, highest = -(-x.shape[-1] * bits // 8), 2**bits - 1
    codes = np.zeros((*x.shape[:-1], width), np.uint8)
    affine = np.zeros((*x.shape[:-1], 2), np.float32)
    for place in np.ndindex(*x.shape[:-1]):
        row = x[place].astype(np.float32)
        low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
        scale = np.float32(high - low) / np.float32(highest) or np.float32(1)
        zero = np.rint(-low / scale)
        for j, value in enumerate(row):
            code = int(np.clip(np.rint(value / scale) + zero, 0, highest))
            codes[place][j % width] |= code << (4 if j >= width else 0)
        affine[place] = scale, zero
    return codes, affine


def test_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-1.5, 0.0, 4.4, 13.5]])
    codes, affine = kv_write(x[None, None], 4)
    # Row 0: scale 0.2, codes 0 5 10 15. Row 1: scale 1, zero 2 (1.5 to even), codes 0 2 6 and 14 + 2 clamped to 15.
    assert codes.tolist() == [[[[0 | 10 << 4, 5 | 15 << 4], [0 | 6 << 4, 2 | 15 << 4]]]]
    torch.testing.assert_close(affine, torch.tensor([[[[0.2, 0.0], [1.0, 2.0]]]]))


def test_8_bits_by_hand() -> None:
    codes, affine = kv_write(torch.tensor([[[[-1.0, 0.0, 1.55]]]]), 8)
    assert affine.flatten().tolist() == pytest.approx([0.01, 100.0])
    assert codes.flatten().tolist() == [0, 100, 255]


@bits_of_codes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 0.5).to(dtype)
    codes, affine = kv_write(x, bits)
    expected_codes, expected_affine = naive(x.float().numpy(), bits)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(affine.numpy(), expected_affine)


@bits_of_codes
def test_rows_of_one_sign_keep_zero_exact(bits: int) -> None:
    x = torch.tensor([[[[2.0, 4.0, 8.0]], [[-2.0, -4.0, -8.0]]]])
    _, affine = kv_write(x, bits)
    assert affine[0, :, 0, 1].tolist() == [0, 2**bits - 1]


@bits_of_codes
def test_zero_and_tiny_rows(bits: int) -> None:
    x = torch.zeros(1, 1, 3, 6)
    x[0, 0, 1] = 1e-45  # a fifteenth of it is 0 in float32
    codes, affine = kv_write(x, bits)
    assert not codes.any()
    assert affine[0, 0, :, 0].tolist() == [1, 1, 1]


@bits_of_codes
def test_a_poisoned_token_stays_alone(bits: int) -> None:
    x = torch.ones(1, 1, 5, 16)
    x[0, 0, 3, 9] = torch.nan
    assert kv_write(x, bits)[1].isnan().any(-1).flatten().tolist() == [False, False, False, True, False]


@bits_of_codes
def test_not_contiguous(bits: int) -> None:
    x = torch.randn(3, 5, 8, 6)
    for view in (x.mT, x.transpose(1, 2), x[:, :, ::2], x[..., 1::2], x[:, :1].expand(-1, 4, -1, -1)):
        for got, expected in zip(kv_write(view, bits), kv_write(view.contiguous(), bits), strict=True):
            assert got.is_contiguous() and torch.equal(got, expected)


@bits_of_codes
def test_survivors_keep_their_codes(bits: int) -> None:
    x = torch.randn(2, 3, 63, 16) * torch.logspace(-3, 3, 63)[:, None]
    index = torch.sort(torch.randperm(63)[:20]).values
    for of_all, of_kept in zip(kv_write(x, bits), kv_write(x[:, :, index], bits), strict=True):
        assert torch.equal(of_all[:, :, index], of_kept)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_packing_places_every_code(codes: list[int]) -> None:
    packed = pack_planes(torch.tensor(codes, dtype=torch.uint8)).tolist()
    plane = -(-len(codes) // 2)
    assert len(packed) == plane
    assert [byte & 15 for byte in packed] == codes[:plane]
    assert [byte >> 4 for byte in packed] == codes[plane:] + [0] * (len(codes) % 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(kv_write, (torch.randn(2, 3, 5, 7, dtype=dtype), 4))
    torch.library.opcheck(kv_write, (torch.randn(2, 3, 6, 5, dtype=dtype).mT, 8))


def test_refuses_other_shapes() -> None:
    with pytest.raises(KernelError, match="3 dimensions"):
        kv_write(torch.zeros(2, 3, 4), 4)
    with pytest.raises(KernelError, match="i64"):
        kv_write(torch.zeros(1, 2, 3, 4, dtype=torch.int64), 8)
    for bits in (2, 16):
        with pytest.raises(KernelError, match=f"bits is {bits}, but must be one of 4, 8"):
            kv_write(torch.zeros(1, 2, 3, 4), bits)


class Write(torch.nn.Module):
    """[B, S, H, D] as a projection leaves it."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *kv_write(x.transpose(1, 2), 4), *kv_write(x.transpose(1, 2), 8)


def test_onnx_is_bit_exact(export_onnx: Callable[..., Any]) -> None:
    from qpcompile.kernels.kv_write.onnx import kv_write as translation

    exported = export_onnx(Write(), [torch.randn(2, 9, 3, 7)], {OVERLOAD: translation})
    for batch, length in ((1, 1), (3, 17), (2, 257)):
        x = torch.randn(batch, length, 3, 7)
        x[0, 0] = 0
        assert all(map(torch.equal, Write()(x), exported(x)))
