"""Cases for attention_kv's Triton kernels under Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from torch import Tensor

from qpcompile.kernels.attention_kv import reference
from qpcompile.kernels.attention_kv import triton as kernels
from qpcompile.kernels.kv_write.reference import kv_write

# Float32 against float64; weights cut to 10 bits where the queries are of a half type.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


BITS = [(4, 4), (8, 8), (8, 4), (4, 8)]


def cache(
    batch: int, groups: int, length: int, head_dim: int, bits: tuple[int, int] = (4, 4)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = (kv_write(torch.randn(batch, groups, length, head_dim), each) for each in bits)
    return *k, *v


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "bits"), [*((dtype, BITS[0]) for dtype in TOLERANCE), *zip(TOLERANCE, BITS[1:], strict=True)]
)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "queries", "length", "head_dim"),
    [
        *((1, 1, 1, 1, 1, 8), (2, 6, 2, 1, 130, 63), (1, 7, 1, 1, 700, 128), (2, 4, 4, 3, 65, 64), (1, 2, 1, 0, 5, 8)),
        *((3, 2, 2, 1, 0, 16), (1, 2, 1, 33, 70, 32), (1, 4, 2, 9, 64, 80)),
        (1, 2, 2, 1, 5, 1),
    ],
)
def test_kernel_is_the_reference(
    batch: int,
    heads: int,
    groups: int,
    queries: int,
    length: int,
    head_dim: int,
    dtype: torch.dtype,
    bits: tuple[int, int],
) -> None:
    q, stored = torch.randn(batch, heads, queries, head_dim).to(dtype), cache(batch, groups, length, head_dim, bits)
    if not length:
        assert torch.equal(kernels.attention_kv(q, *stored, None, 0.3, *bits), torch.zeros_like(q))
        return
    close(kernels.attention_kv(q, *stored, None, 0.3, *bits), reference.attention_kv(q, *stored, None, 0.3, *bits))


@pytest.mark.parametrize("queries", [1, 3, 33])
@pytest.mark.parametrize("kind", ["bool", "float", "half", "per head", "one row"])
def test_masks(kind: str, queries: int) -> None:
    bits = BITS[queries % 4]
    q, stored = torch.randn(2, 4, queries, 24), cache(2, 2, 150, 24, bits)
    mask = torch.rand(2, 1, queries, 150) < 0.6
    mask[0, :, 0] = False
    given: Tensor = mask
    if kind in ("float", "half"):
        given = torch.randn(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        given = given.to(torch.bfloat16 if kind == "half" else torch.float32)
    elif kind == "per head":
        given = torch.rand(1, 4, queries, 150) < 0.6
    elif kind == "one row":
        given = mask[1:, :, :1].expand(-1, -1, queries, -1)
    found = kernels.attention_kv(q, *stored, given, 0.2, *bits)
    close(found, reference.attention_kv(q, *stored, given, 0.2, *bits))
    if kind in ("bool", "float", "half"):
        assert not found[0, :, 0].any()


def test_large_scores_do_not_overflow() -> None:
    q, stored = torch.full((1, 2, 1, 16), 300.0), cache(1, 1, 90, 16)
    close(kernels.attention_kv(q, *stored, None, 1.0, 4, 4), reference.attention_kv(q, *stored, None, 1.0, 4, 4))


def test_poison_shows() -> None:
    q, stored = torch.ones(2, 2, 1, 16), cache(2, 2, 90, 16)
    q[1, 1, 0, 3] = torch.nan
    found = kernels.attention_kv(q, *stored, None, 1.0, 4, 4)
    assert found.isnan().any(-1).flatten().tolist() == [False, False, False, True]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filled", [1, 130, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 192, 200))])
def test_what_is_not_filled_is_neither_read_nor_seen(filled: int, dtype: torch.dtype, masked: bool) -> None:
    bits = BITS[2] if masked else BITS[0]
    q, stored = torch.randn(2, 4, 1, 24).to(dtype), cache(2, 2, 200, 24, bits)
    for part in stored[1::2]:
        part[:, :, filled:] = torch.nan
    mask = torch.rand(2, 1, 1, 200) < 0.7 if masked else None
    k, k_affine, v, v_affine = (part[:, :, :filled] for part in stored)
    seen = None if mask is None else mask[..., :filled]
    found = kernels.attention_kv(q, *stored, mask, 0.3, *bits, torch.tensor([filled]))
    # Bit-identical to a cache that ends there.
    assert torch.equal(found, kernels.attention_kv(q, k, k_affine, v, v_affine, seen, 0.3, *bits))
    close(found, reference.attention_kv(q, *stored, mask, 0.3, *bits, torch.tensor([filled])))


def test_nothing_filled_is_nothing_seen() -> None:
    q, stored = torch.randn(1, 2, 1, 16), cache(1, 1, 100, 16)
    assert not kernels.attention_kv(q, *stored, None, 0.3, 4, 4, torch.tensor([0])).any()


def test_many_rows_of_a_cache_that_is_not_full() -> None:
    q, stored = torch.randn(1, 2, 80, 16), cache(1, 1, 100, 16)
    filled = torch.tensor([90])
    close(
        kernels.attention_kv(q, *stored, None, 0.3, 4, 4, filled),
        reference.attention_kv(q, *stored, None, 0.3, 4, 4, filled),
    )
