"""Running statistics do not depend on how the data is split."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpcompile.calibration import second_moments
from qpcompile.calibration import statistics as module
from qpcompile.calibration.second_moments import SHARE, SecondMoments
from qpcompile.calibration.statistics import ROWS, InputStatistics, Shelf


def test_by_hand() -> None:
    statistics = InputStatistics.empty(2, moments=True)
    statistics.add(torch.tensor([[[1.0, -2.0]], [[3.0, 0.5]]]))
    assert statistics.largest.tolist() == [3.0, 2.0]
    assert statistics.moments is not None
    assert statistics.moments.dense().tolist() == [[10.0, -0.5], [-0.5, 4.25]]
    assert statistics.tokens == 2


def test_no_moments_where_nobody_needs_them() -> None:
    statistics = InputStatistics.empty(3, moments=False)
    statistics.add(torch.ones(4, 3, dtype=torch.bfloat16))
    assert statistics.moments is None and statistics.tokens == 4
    assert statistics.transformed(torch.eye(3)).moments is None


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 19), max_size=4), seed=st.integers(0, 100))
def test_pieces_give_what_the_whole_gives(cuts: list[int], seed: int) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    whole, pieces = InputStatistics.empty(3, moments=True), InputStatistics.empty(3, moments=True)
    whole.add(x)
    for part in torch.tensor_split(x, sorted(set(cuts))):
        pieces.add(part)
    assert torch.equal(whole.largest, pieces.largest) and whole.tokens == pieces.tokens == 20
    assert whole.moments is not None and pieces.moments is not None
    assert torch.allclose(whole.moments.dense(), pieces.moments.dense(), rtol=1e-4, atol=1e-5)


def test_change_of_basis_is_that_of_the_data() -> None:
    made = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(50, 4, generator=made), torch.randn(4, 4, generator=made)
    before, after = InputStatistics.empty(4, moments=True), InputStatistics.empty(4, moments=True)
    before.add(x)
    after.add(x @ matrix.T)
    moved = before.transformed(matrix)
    assert moved.moments is not None and after.moments is not None
    assert torch.allclose(moved.moments.dense(), after.moments.dense(), rtol=1e-4, atol=1e-3)
    assert moved.largest.isnan().all() and moved.tokens == 50


def test_shift_is_that_of_the_data() -> None:
    made = torch.Generator().manual_seed(0)
    x, shift = torch.randn(50, 4, generator=made) + 3, torch.randn(4, generator=made)
    before, after = InputStatistics.empty(4, moments=True), InputStatistics.empty(4, moments=True)
    before.add(x)
    after.add(x - shift)
    moved = before.shifted(shift)
    assert moved.moments is not None and after.moments is not None
    assert torch.allclose(moved.moments.dense(), after.moments.dense(), rtol=1e-4, atol=1e-3)
    assert torch.allclose(moved.mean, after.mean, atol=1e-5) and torch.allclose(moved.rows, after.rows, atol=1e-5)
    centred = before.shifted(before.mean)
    assert centred.mean.abs().max() < 1e-5


def test_what_does_not_count_is_left_out() -> None:
    x = torch.arange(12.0).view(1, 4, 3)
    visual, counts = torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, False]])
    statistics = InputStatistics.empty(3, moments=True)
    statistics.add(x, visual=visual, counts=counts)
    assert statistics.tokens == 2 and statistics.total.tolist() == [6.0, 8.0, 10.0]
    assert statistics.rows.tolist() == [[0, 1, 2], [6, 7, 8]] and statistics.visual.tolist() == [True, False]
    statistics.add(x, counts=torch.zeros(1, 4, dtype=torch.bool))
    assert statistics.tokens == 2


def test_kept_tokens_are_spread_and_bounded() -> None:
    statistics = InputStatistics.empty(1, moments=False)
    statistics.add(torch.arange(100.0)[:, None], keep=4)
    assert statistics.rows.flatten().tolist() == [0, 25, 50, 75] and statistics.tokens == 100
    for _ in range(5):
        statistics.add(torch.ones(ROWS, 1))
    assert statistics.rows.shape == (ROWS, 1) and statistics.visual.shape == (ROWS,)


@pytest.mark.parametrize("count", [1, 50])
def test_size_does_not_grow(count: int) -> None:
    statistics = InputStatistics.empty(4, moments=True)
    for _ in range(count):
        statistics.add(torch.ones(7, 4))
    assert sum(tensor.numel() for tensor in statistics.tensors().values()) <= 4 + 16 + 4 + ROWS * 5 + 1


@pytest.mark.parametrize("large", [0, 2**30], ids=["in a file", "in memory"])
def test_a_shelf_gives_back_what_was_put_on_it(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", large)
    shelf, found = Shelf(), {}
    for name, moments in (("a", True), ("b", False), ("nothing seen", True)):
        found[name] = InputStatistics.empty(5, moments)
        if name != "nothing seen":
            found[name].add(torch.randn(7, 5), visual=torch.arange(7) < 3)
        shelf[name] = found[name]
    shared = copy.deepcopy(shelf)
    shelf["a"] = found["a"].shifted(torch.ones(5))
    assert list(shared) == list(shelf) == list(found) and "c" not in shelf and shelf.get("c") is None
    for name, expected in found.items():
        for _ in range(2):
            given, wanted = shared[name].tensors(), expected.tensors()
            assert list(given) == list(wanted)
            assert all(torch.equal(given[part], wanted[part]) for part in wanted)
    assert not torch.equal(shelf["a"].total, shared["a"].total)


def test_strips_change_nothing_but_how_much_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = InputStatistics.empty(10, moments=True)
    found.add(torch.randn(30, 10))
    matrix = torch.randn(10, 10)
    whole = found.transformed(matrix), found.shifted(torch.arange(10.0))
    monkeypatch.setattr(second_moments, "STRIP", 3)
    parts = found.transformed(matrix), found.shifted(torch.arange(10.0))
    for one, other in zip(whole, parts, strict=True):
        assert one.moments is not None and other.moments is not None
        assert torch.allclose(one.moments.dense(), other.moments.dense(), rtol=1e-5, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 5), max_size=5), seed=st.integers(0, 100))
def test_few_tokens_are_held_as_they_are(counts: list[int], seed: int) -> None:
    """And answer as their matrix does, whatever is asked, before and after there are too many."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 24, generator=made)
    found = SecondMoments.empty(24)
    for part in x.split(counts):
        found = found.plus(part)
    assert (found.matrix is None) == (sum(counts) <= 24 // SHARE)
    plain, wide, shift = SecondMoments(x.T @ x), torch.randn(24, 24, generator=made).double(), torch.rand(24).double()
    weight, total = torch.randn(3, 24, generator=made), x.double().sum(dim=0)
    for one, other in (
        (found, plain),
        (found.transformed(wide), plain.transformed(wide)),
        (found.turned(lambda rows: rows @ wide.T), plain.transformed(wide)),
        (found.shifted(shift, total, len(x)), plain.shifted(shift, total, len(x))),
    ):
        again = SecondMoments.of_tensors(one.tensors())
        assert again is not None and torch.equal(again.dense(), one.dense())
        torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.diagonal, other.diagonal, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.energy(weight), other.energy(weight), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("tokens_of_moments", (7, 24), torch.float32),
        ("tokens_of_moments", (2, 23), torch.float32),
        ("tokens_of_moments", (2, 24), torch.float64),
        ("tokens_of_moments", (), torch.float32),
        ("moments", (24, 24), torch.float32),
        ("rows", (3, 23), torch.float32),
        ("visual", (2,), torch.bool),
    ],
)
def test_damaged_statistics_are_refused(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = InputStatistics.empty(24, moments=True)
    found.add(torch.randn(3, 24))
    held = found.tensors()
    assert InputStatistics.checked(dict(held), 24, True).tokens == 3
    with pytest.raises(ValueError, match=rf"{name}.* channels|statistics have"):
        InputStatistics.checked(held | {name: torch.zeros(shape, dtype=dtype)}, 24, True)
