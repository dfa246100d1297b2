"""rope_kv_write and rope_kv_append: bit for bit the composition of their parts, in C and in ONNX."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.hadamard.cpu import hadamard
from qpcompile.kernels.kv_write.cpu import kv_write
from qpcompile.kernels.native import library as native
from qpcompile.kernels.rope.cpu import rope
from qpcompile.kernels.rope_kv_append import op as append_op
from qpcompile.kernels.rope_kv_append.reference import rope_kv_append as append_reference
from qpcompile.kernels.rope_kv_write import cpu
from qpcompile.kernels.rope_kv_write import op as write_op
from qpcompile.kernels.rope_kv_write.reference import rope_kv_write as write_reference

ours = torch.ops.qpcompile
rope_kv_write = ours.rope_kv_write
LEVELS = range(native.library().level + 1) if native.available() else range(0)
# (batch, query heads, key heads, tokens, head size): one key head for several, an odd factor, one token, none.
SHAPES = [(2, 6, 2, 17, 80), (1, 4, 4, 1, 128), (3, 3, 1, 5, 2), (1, 2, 1, 63, 48), (1, 2, 2, 0, 8), (1, 28, 4, 3, 64)]
BITS = [(4, 4), (8, 8), (8, 4), (4, 8)]
all_bits = pytest.mark.parametrize("bits", BITS, ids=str)
KINDS = [(True, True), (True, False), (False, True)]
both = pytest.mark.parametrize(("tables", "rotate"), KINDS, ids=["rope and rotation", "rope", "rotation"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def given(
    shape: tuple[int, ...],
    tables: bool,
    rotate: bool,
    dtype: torch.dtype = torch.float32,
    rows: int = 1,
    bits: tuple[int, int] = (4, 4),
) -> list[Any]:
    """Views of one product [B, S, (Hq + 2 Hkv) D], as a merged linear leaves them, the tables, `rotate` and bits."""
    batch, heads, groups, tokens, size = shape
    torch.manual_seed(size)
    product = (torch.randn(batch, tokens, (heads + 2 * groups) * size) * 3).to(dtype)
    parts = product.split((heads * size, groups * size, groups * size), dim=-1)
    views = [part.unflatten(-1, (part.shape[-1] // size, size)).transpose(1, 2) for part in parts]
    angles = torch.randn(rows, 1, tokens, size) * 9
    return [*views, *((angles.cos(), angles.sin()) if tables else (None, None)), rotate, *bits]


def by_parts(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, rotate: bool, k_bits: int, v_bits: int
) -> tuple[Any, ...]:
    """The kernels of the operators that it fuses."""
    if cos is not None and sin is not None:
        q, k = rope(q, cos, sin), rope(k, cos, sin)
    if rotate:
        q, k = hadamard(q, None), hadamard(k, None)
    return q, *kv_write(k, k_bits), *kv_write(v, v_bits)


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@both
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_centred_keys(shape: tuple[int, ...], dtype: torch.dtype, tables: bool, rotate: bool) -> None:
    """The keys alone are less by a constant of each head; queries and values are those without it."""
    operands = given(shape, tables, rotate, dtype)
    center = torch.randn(1, shape[2], 1, shape[4]).to(dtype)
    found, plain = rope_kv_write(*operands, center), rope_kv_write(*operands)
    _, k, _, cos, sin, *_ = operands
    key = k if cos is None else rope(k, cos, sin)
    key = hadamard(key, None) if rotate else key
    assert same(found, (plain[0], *kv_write(key - center, 4), *plain[3:]))
    if dtype == torch.float32:
        double = [*wide(operands), center]
        assert same(rope_kv_write(*double), write_reference(*double))
        past = [*kv_write(torch.randn(shape[0], shape[2], 3, shape[4]), 4)] * 2
        joined = found[0], *(torch.cat(parts, 2) for parts in zip(past, found[1:], strict=True))
        assert same(append_op.rope_kv_append(*operands, *past, center), joined)
        assert_close(append_reference(*operands, *past, center), joined, (4, 4))


def test_by_hand() -> None:
    q = torch.tensor([[[[1.0, 0.0]]]])
    k, v = torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[-1.5, 13.5]]]])
    zero, one = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    # A quarter turn: q' = (0, 1), k' = (-2, 0), with scale 2 / 15 and zero point 15.
    y, k_codes, k_affine, v_codes, v_affine = rope_kv_write(q, k, v, zero, one, False, 4, 4)
    assert y.flatten().tolist() == [0, 1] and k_codes.flatten().tolist() == [0 | 15 << 4]
    torch.testing.assert_close(k_affine.flatten(), torch.tensor([2 / 15, 15.0]))
    assert v_codes.flatten().tolist() == [0 | 15 << 4] and v_affine.flatten().tolist() == [1, 2]
    _, k_codes, k_affine, v_codes, v_affine = rope_kv_write(q, k, v, zero, one, False, 8, 8)
    assert k_codes.flatten().tolist() == [0, 255] and v_codes.flatten().tolist() == [0, 255]
    torch.testing.assert_close(k_affine.flatten(), torch.tensor([2 / 255, 255.0]))
    torch.testing.assert_close(v_affine.flatten(), torch.tensor([15 / 255, 26.0]))  # 25.5 to even
    # The rotation of two channels is their sum and difference over sqrt(2).
    y, *_ = rope_kv_write(q, k, v, None, None, True, 4, 8)
    torch.testing.assert_close(y.flatten(), torch.tensor([0.5, 0.5]).sqrt())


def wide(operands: list[Any]) -> list[Any]:
    """The same heads in float64, as exact numerics give them."""
    return [*(each.double() for each in operands[:3]), *operands[3:]]


def assert_close(found: tuple[Any, ...], expected: tuple[Any, ...], bits: tuple[int, int]) -> None:
    """Sums of the rotation in another order: a code next to a tie may differ by one step."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    parts = found[1:3] + expected[1:3], found[3:5] + expected[3:5]
    for (codes, affine, wanted, scales), width in zip(parts, bits, strict=True):
        steps = [(each & 15, each >> 4) if width == 4 else (each,) for each in (codes.int(), wanted.int())]
        differing = sum(int((one - other).abs().sum()) for one, other in zip(*steps, strict=True))
        assert differing <= 1 + codes.numel() // (1000 if width == 4 else 100)
        torch.testing.assert_close(affine, scales, rtol=1e-5, atol=1e-5)


@all_bits
@both
@shapes
def test_float64_is_the_reference(shape: tuple[int, ...], tables: bool, rotate: bool, bits: tuple[int, int]) -> None:
    operands = wide(given(shape, tables, rotate, rows=shape[0], bits=bits))
    found, expected = rope_kv_write(*operands), write_reference(*operands)
    assert found[0].dtype == torch.float64 and same(found, expected)
    # Heads hold float32 values, and all but the rotation's sums is float32.
    assert torch.equal(found[0], found[0].float().double())


@all_bits
@both
@shapes
def test_float32_is_its_parts(shape: tuple[int, ...], tables: bool, rotate: bool, bits: tuple[int, int]) -> None:
    operands = given(shape, tables, rotate, rows=shape[0], bits=bits)
    found = rope_kv_write(*operands)
    assert same(found, by_parts(*operands))
    assert_close(found, write_reference(*operands), bits)


@both
@shapes
@pytest.mark.parametrize("tables_in", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_as_its_parts(
    shape: tuple[int, ...], dtype: torch.dtype, tables_in: torch.dtype, tables: bool, rotate: bool
) -> None:
    *heads, cos, sin, _, k_bits, v_bits = given(shape, tables, rotate, dtype, bits=(8, 4))
    narrow = (None if each is None else each.to(tables_in) for each in (cos, sin))
    operands = [*heads, *narrow, rotate, k_bits, v_bits]
    assert same(rope_kv_write(*operands), by_parts(*operands))


@pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
@all_bits
@both
@shapes
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(
    shape: tuple[int, ...],
    tables: bool,
    rotate: bool,
    level: int,
    bits: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operands = given(shape, tables, rotate, bits=bits)
    single, expected = write_reference(*operands), write_reference(*wide(operands))
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *sizes, **options: empty(*sizes, **options).fill_(
            torch.nan if options["dtype"].is_floating_point else 255
        ),
    )
    assert same(cpu._native(*wide(operands), level=level), expected)
    assert_close(cpu._native(*operands, level=level), single, bits)


def test_any_layout() -> None:
    q, k, v, cos, sin, *settings = given((2, 4, 2, 5, 8), True, True, bits=(8, 4))
    expected = rope_kv_write(q, k, v, cos, sin, *settings)
    odd = [each.mT.contiguous().mT for each in (q, k, v)]
    assert odd[0].stride(-1) != 1 and same(rope_kv_write(*odd, cos, sin, *settings), expected)
    assert same(rope_kv_write(q, k, v, cos.mT.contiguous().mT, sin.expand(2, -1, -1, -1), *settings), expected)
    one = cos[:, :, :1], sin[:, :, :1]
    alike = [each.expand(-1, -1, 5, -1).contiguous() for each in one]
    assert same(rope_kv_write(q, k, v, *one, *settings), rope_kv_write(q, k, v, *alike, *settings))


def test_a_poisoned_token_stays_alone() -> None:
    q, k, v, *rest = given((1, 2, 1, 5, 16), True, True, bits=(8, 4))
    k[0, 0, 3, 9] = torch.nan
    _, _, k_affine, _, v_affine = rope_kv_write(q, k, v, *rest)
    assert k_affine.isnan().any(-1).flatten().tolist() == [False, False, False, True, False]
    assert v_affine.isfinite().all()


@all_bits
@both
@pytest.mark.parametrize("before", [0, 1, 7])
def test_append_joins_with_the_past(before: int, tables: bool, rotate: bool, bits: tuple[int, int]) -> None:
    operands = given((2, 4, 2, 1, 16), tables, rotate, bits=bits)
    past = [part for each in bits for part in kv_write(torch.randn(2, 2, before, 16), each)]
    y, *new = rope_kv_write(*operands)
    expected = y, *(torch.cat(parts, 2) for parts in zip(past, new, strict=True))
    assert same(append_op.rope_kv_append(*operands, *past), expected)
    assert same(append_reference(*wide(operands), *past), append_op.rope_kv_append(*wide(operands), *past))


def test_opcheck() -> None:
    operands = given((2, 4, 2, 3, 8), True, True, bits=(8, 4))
    past = [*kv_write(torch.randn(2, 2, 5, 8), 8), *kv_write(torch.randn(2, 2, 5, 8), 4)]
    torch.library.opcheck(write_op.rope_kv_write, tuple(operands))
    torch.library.opcheck(write_op.rope_kv_write, (*(each.bfloat16() for each in operands[:3]), None, None, True, 4, 8))
    torch.library.opcheck(append_op.rope_kv_append, (*operands, *past))


def test_refusals() -> None:
    q, k, v, cos, sin, *_ = given((2, 4, 2, 3, 8), True, True)
    past = [*kv_write(torch.randn(2, 2, 5, 8), 4)] * 2
    append = functools.partial(append_op.rope_kv_append, q, k, v, cos, sin, True)
    rope_kv_write = functools.partial(ours.rope_kv_write, k_bits=4, v_bits=4)
    refused = [
        ("D is 7: D must be even", lambda: rope_kv_write(q[..., :7], k[..., :7], v[..., :7], None, None, True)),
        ("Hq must be a multiple", lambda: rope_kv_write(q[:, :3], k, v, cos, sin, True)),
        ("cos and sin must be given together", lambda: rope_kv_write(q, k, v, cos, None, True)),
        ("rotate must be True", lambda: rope_kv_write(q, k, v, None, None, False)),
        ("k is bf16", lambda: rope_kv_write(q, k.bfloat16(), v, cos, sin, True)),
        ("v is f32", lambda: rope_kv_write(q, k, v[..., :6], cos, sin, True)),
        ("cos is f32", lambda: rope_kv_write(q, k, v, cos.expand(-1, 4, -1, -1), sin, True)),
        ("k_codes is u8", lambda: append(4, 4, past[0][..., :3], *past[1:])),
        ("v_affine is f32", lambda: append(4, 4, *past[:3], past[3][:, :, :4])),
        ("k_codes is u8", lambda: append(8, 4, *past)),
        ("v_codes is u8", lambda: append(4, 8, *past)),
        ("k_bits is 16, but must be one of 4, 8", lambda: append(16, 4, *past)),
    ]
    for message, call in refused:
        with pytest.raises(KernelError, match=message):
            call()


class Write(torch.nn.Module):
    """The product of a merged linear [B, S, 8 heads of 8], 4 of them queries, and a cache of keys and values."""

    def __init__(self, tables: bool, rotate: bool, bits: tuple[int, int]) -> None:
        super().__init__()
        self.tables, self.rotate, self.bits = tables, rotate, bits

    def operands(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
        heads = x.unflatten(-1, (8, 8)).transpose(1, 2)
        tables = (cos.unsqueeze(1), sin.unsqueeze(1)) if self.tables else (None, None)
        return heads[:, :4], heads[:, 4:6], heads[:, 6:], *tables, self.rotate, *self.bits

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return ours.rope_kv_write(*self.operands(x, cos, sin))


class Append(Write):
    """The same, appended."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        return append_op.rope_kv_append(*self.operands(x, cos, sin), *past)


@pytest.mark.parametrize("bits", [(4, 4), (8, 4)], ids=str)
@both
def test_onnx_is_bit_exact(export_onnx: Callable[..., Any], tables: bool, rotate: bool, bits: tuple[int, int]) -> None:
    from qpcompile.kernels.rope_kv_write.onnx import rope_kv_write as translation

    module = Write(tables, rotate, bits)
    sample = [torch.randn(2, 9, 64), *torch.randn(2, 2, 9, 8)]
    exported = export_onnx(module, sample, {write_op.OVERLOAD: translation})
    for batch, length in ((1, 1), (3, 17)):
        inputs = [torch.randn(batch, length, 64), *torch.randn(2, batch, length, 8)]
        assert same(exported(*inputs), module(*inputs))
