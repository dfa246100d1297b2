"""Sums over blocks, from the matrix and from rows, in parts and lifted, against einsum on the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.quantization import block_sums
from qpcompile.quantization.block_sums import BlockSums, SumsOfMatrix, SumsOfRows


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def symmetric(size: int, seed: int) -> torch.Tensor:
    found = noise(size, size, seed=seed).double()
    return found + found.T


def check(sums: BlockSums, whole: torch.Tensor) -> None:
    """Against sums over whole: f64[A c, A c]."""
    left, right = sums.sizes
    blocks = whole.view(left, right, left, right)
    inner, outer = symmetric(right, seed=7), symmetric(left, seed=8)
    found, expected = sums.left(inner), torch.einsum("aibj,ij->ab", blocks, inner)
    assert found.dtype == torch.float64 and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    found, expected = sums.right(outer), torch.einsum("aibj,ab->ij", blocks, outer)
    assert found.dtype == torch.float64 and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(left=st.integers(1, 5), right=st.integers(1, 5), rows=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_both_ways_give_what_the_whole_gives(left: int, right: int, rows: list[int]) -> None:
    matrices = [noise(count, left * right, seed=number) for number, count in enumerate(rows)]
    every = torch.cat(matrices).double()
    whole = every.T @ every
    check(SumsOfRows((left, right), matrices), whole)
    check(SumsOfMatrix((left, right), whole), whole)
    check(
        SumsOfMatrix((left, right), whole).lifted(0.3), whole + 0.3 * whole.trace() / len(whole) * torch.eye(len(whole))
    )


@pytest.mark.parametrize("part", [1, 25, 36])
def test_parts_of_any_size(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sums, "PART", part)
    rows = noise(11, 12).bfloat16()
    whole = rows.double().T @ rows.double()
    check(SumsOfRows((3, 4), [rows]), whole)


def test_what_is_given_stays_as_it_was() -> None:
    matrix, rows = symmetric(12, seed=1), noise(5, 12)
    before = matrix.clone(), rows.clone()
    for sums in (SumsOfMatrix((3, 4), matrix), SumsOfRows((3, 4), [rows])):
        sums.lifted(0.1).left(symmetric(4, seed=2))
        sums.lifted(0.1).right(symmetric(3, seed=3))
    assert torch.equal(matrix, before[0]) and torch.equal(rows, before[1])
