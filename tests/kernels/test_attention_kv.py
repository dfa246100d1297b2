"""attention_kv against one query at a time in float64, on both CPU paths and in onnxruntime."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpcompile.errors import KernelError
from qpcompile.kernels.attention_kv import cpu, reference
from qpcompile.kernels.attention_kv.op import OVERLOAD, attention_kv
from qpcompile.kernels.kv_read.reference import kv_read
from qpcompile.kernels.kv_write.op import kv_write
from qpcompile.kernels.native import library as native

BITS = [(4, 4), (8, 8), (8, 4), (4, 8)]
"""Of the codes of keys and of values."""
all_bits = pytest.mark.parametrize("bits", BITS, ids=str)
# (batch, query heads, key heads, queries, keys, head size)
CASES = [(1, 1, 1, 1, 1, 1), (2, 6, 2, 1, 63, 33), (1, 4, 4, 17, 17, 7), (2, 6, 2, 63, 63, 16), (1, 4, 1, 5, 257, 64)]
MASKS = ["none", "bool", "float", "per_head"]
# Float32 sums of up to 257 products of order 1, in a different summation order.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def make(
    case: tuple[int, ...], mask: str, dtype: torch.dtype = torch.float32, bits: tuple[int, int] = (4, 4)
) -> tuple[Any, ...]:
    batch, heads, groups, rows, keys, head_dim = case
    torch.manual_seed(0)
    q = torch.randn(batch, heads, rows, head_dim).to(dtype)
    k, v = (kv_write(torch.randn(batch, groups, keys, head_dim), each) for each in bits)
    allowed = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).expand(batch, 1, -1, -1)
    masks = {
        "none": None,
        "bool": allowed,
        "float": torch.zeros(1, 1, rows, keys).masked_fill(~allowed[:1], torch.finfo(torch.float32).min),
        "per_head": torch.randn(batch, heads, rows, keys).masked_fill(~allowed, -torch.inf),
    }
    return q, *k, *v, masks[mask], 0.3, *bits


def naive(
    q: Tensor,
    k_codes: Tensor,
    k_affine: Tensor,
    v_codes: Tensor,
    v_affine: Tensor,
    mask: Tensor | None,
    scale: float,
    k_bits: int,
    v_bits: int,
) -> np.ndarray:
    """One batch row, head and query at a time, in float64."""
    batch, heads, rows, head_dim = q.shape
    k = kv_read(k_codes, k_affine, head_dim, k_bits, torch.float64).numpy()
    v = kv_read(v_codes, v_affine, head_dim, v_bits, torch.float64).numpy()
    term = None if mask is None else mask.expand(batch, heads, -1, -1)
    y = np.zeros(q.shape)
    for b, h, i in np.ndindex(batch, heads, rows):
        group = h // (heads // k.shape[1])
        logits = scale * k[b, group] @ q[b, h, i].double().numpy()
        if term is not None:
            row = term[b, h, i]
            logits = np.where(row, logits, -np.inf) if row.dtype == torch.bool else logits + row.double().numpy()
        weights = np.exp(logits - logits.max())
        y[b, h, i] = weights / weights.sum() @ v[b, group]
    return y


@all_bits
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_routes_equal_the_formula(case: tuple[int, ...], mask: str, bits: tuple[int, int]) -> None:
    inputs = make(case, mask, bits=bits)
    expected = torch.from_numpy(naive(*inputs)).float()
    for attend in (reference.attention_kv, cpu._attend_to_codes, cpu._attend_to_values, attention_kv):
        torch.testing.assert_close(attend(*inputs).float(), expected, **CLOSE)


def test_by_hand() -> None:
    # Codes and scales are exact here: keys 0 and 15, values 3 and 12 in one channel, scores 0 and ln 2.
    # One channel takes one byte in both widths.
    for k_bits, v_bits in BITS:
        k, v = (
            kv_write(torch.tensor([[[[a], [b]]]]), bits)
            for a, b, bits in ((0.0, 2.0**k_bits - 1, k_bits), (3.0, 12.0, v_bits))
        )
        scale = float(np.log(2) / (2**k_bits - 1))
        y = attention_kv(torch.ones(1, 1, 1, 1), *k, *v, None, scale, k_bits, v_bits)
        assert y.item() == pytest.approx(3 / 3 + 12 * 2 / 3, rel=0.005)


# Keys of 32, 36, 48 and 64 bytes are multiplied in registers where one row reads them; of 30 and 68 bytes not.
@pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
@pytest.mark.parametrize("head_dim", [60, 64, 72, 96, 128, 136])
@pytest.mark.parametrize("keys", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 33])
@pytest.mark.usefixtures("poison")
def test_one_row_in_c_at_every_level(keys: int, head_dim: int) -> None:
    inputs = make((2, 3, 3, 1, keys, head_dim), "per_head")
    expected = torch.from_numpy(naive(*inputs)).float()
    for level in range(native.library().level + 1):
        torch.testing.assert_close(cpu._native(*inputs, level=level), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_queries(dtype: torch.dtype) -> None:
    inputs = make(CASES[3], "bool", dtype, (8, 4))
    got = attention_kv(*inputs)
    assert got.dtype == dtype
    # Half precision may cost only one rounding of the result, whose entries are below 4.
    assert (got.double() - torch.from_numpy(naive(*inputs))).abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("fill", [False, -torch.inf, torch.finfo(torch.float16).min, torch.finfo(torch.float32).min])
def test_a_query_that_sees_nothing_gets_zero(rows: int, fill: float) -> None:
    q, *cache, _, scale, k_bits, v_bits = make((2, 4, 2, rows, 9, 8), "none", bits=(4, 8))
    mask = torch.ones(2, 1, rows, 9, dtype=torch.bool) if fill is False else torch.zeros(2, 1, rows, 9)
    mask[0, 0, 0] = fill
    inputs: Any = (q, *cache, mask, scale, k_bits, v_bits)
    y = attention_kv(*inputs)
    assert not y[0, :, 0].any()
    assert torch.isfinite(y).all() and (y[0, :, 1] != 0).all() and (y[1] != 0).all()
    torch.testing.assert_close(y, reference.attention_kv(*inputs), **CLOSE)


@all_bits
def test_decode_equals_the_last_row_of_prefill(bits: tuple[int, int]) -> None:
    q, *cache, mask, scale, _, _ = make((2, 6, 2, 63, 63, 16), "bool", bits=bits)
    decoded = attention_kv(q[:, :, -1:], *cache, None, scale, *bits)
    torch.testing.assert_close(decoded, attention_kv(q, *cache, mask, scale, *bits)[:, :, -1:], **CLOSE)


@all_bits
def test_gathered_cache_equals_masked_cache(bits: tuple[int, int]) -> None:
    q, *cache, _, scale, _, _ = make((1, 4, 2, 3, 63, 16), "none", bits=bits)
    index = torch.sort(torch.randperm(63)[:20]).values
    mask = torch.zeros(1, 1, 3, 63, dtype=torch.bool).index_fill(3, index, True)
    gathered = attention_kv(q, *[part[:, :, index] for part in cache], None, scale, *bits)
    torch.testing.assert_close(gathered, attention_kv(q, *cache, mask, scale, *bits), **CLOSE)


@all_bits
@pytest.mark.parametrize("rows", [2, 40])
def test_not_contiguous(rows: int, bits: tuple[int, int]) -> None:
    inputs = make((2, 4, 2, rows, 9, 8), "none", bits=bits)
    views = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in inputs[:5]]
    torch.testing.assert_close(attention_kv(*views, *inputs[5:]), reference.attention_kv(*inputs), **CLOSE)


@pytest.mark.parametrize("rows", [1, 40])
def test_tokens_are_outside_heads_in_memory(rows: int) -> None:
    y = attention_kv(*make((2, 4, 2, rows, 40, 8), "none"))
    assert y.transpose(1, 2).is_contiguous()
    assert y.transpose(1, 2).view(2, rows, 32).shape == (2, rows, 32)


@all_bits
@pytest.mark.parametrize("rows", [1, 40])
def test_no_batch_and_no_tokens(rows: int, bits: tuple[int, int]) -> None:
    q, *cache, _, scale, _, _ = make((2, 4, 2, rows, 9, 7), "none", bits=bits)
    for empty in ((q[:0], *(part[:0] for part in cache)), (q[:, :, :0], *cache)):
        assert attention_kv(*empty, None, scale, *bits).shape == empty[0].shape


@pytest.mark.parametrize(
    ("rows", "mask", "bits"), [(1, "none", (4, 4)), (40, "bool", (8, 8)), (40, "float", (8, 4)), (1, "bool", (4, 8))]
)
def test_opcheck(rows: int, mask: str, bits: tuple[int, int]) -> None:
    torch.library.opcheck(attention_kv, make((2, 4, 2, rows, 40, 7), mask, bits=bits))


def test_refusals() -> None:
    q, *cache, _, scale, _, _ = make((1, 4, 2, 3, 5, 8), "none")
    with pytest.raises(KernelError, match="Hq is 3, Hkv is 2"):
        attention_kv(q[:, :3], *cache, None, scale, 4, 4)
    with pytest.raises(KernelError, match=r"bytes\(D, k_bits\) is 3 and not 4"):
        attention_kv(q[..., :6], *cache, None, scale, 4, 4)
    with pytest.raises(KernelError, match=r"bytes\(D, k_bits\) is 8 and not 4"):
        attention_kv(q, *cache, None, scale, 8, 4)
    with pytest.raises(KernelError, match=r"bytes\(D, v_bits\) is 8 and not 4"):
        attention_kv(q, *cache, None, scale, 4, 8)
    with pytest.raises(KernelError, match="v_bits is 16, but must be one of 4, 8"):
        attention_kv(q, *cache, None, scale, 4, 16)
    with pytest.raises(KernelError, match="mask is i64"):
        attention_kv(q, *cache, torch.ones(1, 1, 3, 5, dtype=torch.int64), scale, 4, 4)


class Attend(torch.nn.Module):
    """Queries, keys and values [B, S, heads, D] under left padding, with each kind of mask."""

    def __init__(self, bits: tuple[int, int]) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> list[Tensor]:
        length = q.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        masks = (None, allowed, torch.where(allowed, 0.25, torch.finfo(torch.float32).min))
        cache = *kv_write(k, self.bits[0]), *kv_write(v, self.bits[1])
        return [attention_kv(q, *cache, mask, 0.3, *self.bits) for mask in masks]


@all_bits
def test_onnx(export_onnx: Callable[..., Any], bits: tuple[int, int]) -> None:
    from qpcompile.kernels.attention_kv.onnx import attention_kv as translation
    from qpcompile.kernels.kv_write.onnx import kv_write as write_translation
    from qpcompile.kernels.kv_write.op import OVERLOAD as WRITE

    def inputs(batch: int, length: int) -> list[Tensor]:
        valid = torch.ones(batch, length, dtype=torch.bool)
        valid[0, : length // 3] = False
        return [torch.randn(batch, length, heads, 7) for heads in (6, 2, 2)] + [valid]

    exported = export_onnx(Attend(bits), inputs(2, 9), {OVERLOAD: translation, WRITE: write_translation})
    for batch, length in ((1, 1), (3, 17), (2, 63)):
        given = inputs(batch, length)
        for got, expected in zip(exported(*given), Attend(bits)(*given), strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)
