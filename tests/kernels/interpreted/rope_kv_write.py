"""Cases for rope_kv_write in Triton's interpreter; see test_triton_interpreter.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.kv_read.reference import kv_read
from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.kernels.rope_kv_append import reference as append_reference
from qpcompile.kernels.rope_kv_write import reference
from qpcompile.kernels.rope_kv_write.triton import rope_kv_append, rope_kv_write, tiling_of

# (batch, query heads, key heads, tokens, head size): several heads a program and one, odd factors, none, no tile.
SHAPES = [(1, 4, 2, 3, 128), (2, 3, 1, 17, 80), (1, 2, 2, 1, 2), (1, 2, 1, 0, 8), (1, 2, 1, 5, 256), (1, 1, 1, 2, 24)]
BITS = [(4, 4), (8, 8), (8, 4), (4, 8)]
KINDS = [(True, True), (True, False), (False, True)]
kinds = pytest.mark.parametrize(("tables", "rotate"), KINDS, ids=["rope and rotation", "rope", "rotation"])


def given(
    shape: tuple[int, ...],
    tables: bool,
    rotate: bool,
    dtype: torch.dtype = torch.float32,
    bits: tuple[int, int] = (4, 4),
) -> list[Any]:
    """Views of one product [B, S, (Hq + 2 Hkv) D], as a merged linear leaves them, the tables, `rotate` and bits."""
    batch, heads, groups, tokens, size = shape
    torch.manual_seed(size)
    parts = (
        torch.randn(batch, tokens, (heads + 2 * groups) * size)
        .to(dtype)
        .split((heads * size, groups * size, groups * size), -1)
    )
    angles = torch.randn(1, 1, tokens, size) * 9
    views = [part.unflatten(-1, (part.shape[-1] // size, size)).transpose(1, 2) for part in parts]
    return [*views, *((angles.cos(), angles.sin()) if tables else (None, None)), rotate, *bits]


def check(
    found: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    size: int,
    rotate: bool,
    dtype: torch.dtype,
    k_bits: int = 4,
) -> None:
    """Values and scales up to TF32 parts where rotated, else the reference's; codes then differ next to ties only."""
    if not rotate and dtype == torch.float32:
        assert all(map(torch.equal, found, expected))
        return
    # The interpreter truncates float32 to bfloat16 where hardware rounds.
    near = 2**-6 if dtype == torch.bfloat16 else 2**-9 if dtype == torch.float16 else 2**-18
    torch.testing.assert_close(found[0], expected[0], rtol=near, atol=8 * near)
    assert all(map(torch.equal, found[3:], expected[3:]))
    torch.testing.assert_close(found[2][..., 0], expected[2][..., 0], rtol=8 * near, atol=0)
    keys = [kv_read(each[1], each[2], size, k_bits, torch.float32) for each in (found, expected)]
    step = expected[2][..., :1]
    assert ((keys[0] - keys[1]).abs() <= (1 + 64 * near) * step + 1e-6).all()
    most = 0.001 if dtype == torch.float32 else 0.2
    assert (found[1] != expected[1]).sum() <= most * found[1].numel()


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference(shape: tuple[int, ...], tables: bool, rotate: bool) -> None:
    operands = given(shape, tables, rotate)
    expected = reference.rope_kv_write(*operands)
    check(rope_kv_write(*operands), expected, shape[4], rotate, torch.float32)


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_centred_keys(shape: tuple[int, ...], tables: bool, rotate: bool) -> None:
    operands = given(shape, tables, rotate)
    center = torch.randn(1, shape[2], 1, shape[4])
    centred = [*operands, center]
    expected = reference.rope_kv_write(*centred)
    check(rope_kv_write(*centred), expected, shape[4], rotate, torch.float32)
    past = [*kv_write(torch.randn(shape[0], shape[2], 2, shape[4]), 4)] * 2
    expected = append_reference.rope_kv_append(*operands, *past, center)
    check(rope_kv_append(*operands, *past, center), expected, shape[4], rotate, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@kinds
def test_half_precision(tables: bool, rotate: bool, dtype: torch.dtype) -> None:
    operands = given((1, 4, 2, 3, 128), tables, rotate, dtype)
    expected = reference.rope_kv_write(*operands)
    check(rope_kv_write(*operands), expected, 128, rotate, dtype)


@pytest.mark.parametrize("bits", BITS[1:], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3]], ids=str)
def test_other_bits(shape: tuple[int, ...], bits: tuple[int, int]) -> None:
    operands = given(shape, True, False, bits=bits)
    check(rope_kv_write(*operands), reference.rope_kv_write(*operands), shape[4], False, torch.float32)


def test_8_bits_of_rotated_keys() -> None:
    operands = given((1, 4, 2, 3, 128), True, True, bits=(8, 4))
    found, expected = rope_kv_write(*operands), reference.rope_kv_write(*operands)
    check(found, expected, 128, True, torch.float32, 8)


@kinds
@pytest.mark.parametrize("before", [0, 1, 5])
def test_append(before: int, tables: bool, rotate: bool) -> None:
    bits = BITS[0] if rotate else BITS[2]
    operands = given((2, 4, 2, 1, 64), tables, rotate, bits=bits)
    past = [part for each in bits for part in kv_write(torch.randn(2, 2, before, 64), each)]
    expected = append_reference.rope_kv_append(*operands, *past)
    check(rope_kv_append(*operands, *past), expected, 64, rotate, torch.float32)


def test_other_layouts_and_widths() -> None:
    q, k, v, cos, sin, *settings = given((1, 2, 1, 3, 16), True, True)
    expected = rope_kv_write(q, k, v, cos, sin, *settings)
    q, k, v, cos, sin = (each.mT.contiguous().mT for each in (q, k, v, cos, sin))
    assert all(map(torch.equal, rope_kv_write(q, k, v, cos, sin, *settings), expected))
    # An odd factor of 131 fits no tile: its parts are run.
    assert tiling_of(2 * 131, True) is None
    operands = given((1, 1, 1, 2, 2 * 131), True, True)
    expected = reference.rope_kv_write(*operands)
    check(rope_kv_write(*operands), expected, 2 * 131, True, torch.float32)


def test_a_poisoned_token_stays_alone() -> None:
    q, k, v, *rest = given((1, 2, 1, 20, 32), True, True)
    k[0, 0, 3, 9] = torch.nan
    assert rope_kv_write(q, k, v, *rest)[2].isnan().any(-1).flatten().nonzero().flatten().tolist() == [3]
