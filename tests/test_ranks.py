"""Work is split over ranks so that all have the results of one process, in its order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import captured, changed_recipe, fresh
from rank_threads import on_ranks

from qpcompile.calibration.site_sums import SiteSums
from qpcompile.calibration.statistics import InputStatistics
from qpcompile.errors import CalibrationError, RankError
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.pass_manager import run_passes
from qpcompile.ir.program import Program
from qpcompile.pass_list import passes
from qpcompile.ranks import Ranks, ended, shares, turns, windows
from qpcompile.recipe.recipe import Recipe

SIZES = st.integers(1, 5)
MEASURED = (
    "tokens.method=joint",
    "tokens.keep=0.25",
    "tokens.keep_of=mean",
    "tokens.compact_scored_layer=false",
)


class Three:
    """Three samples of two lengths."""

    CASES = ("one", "longer", "one")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        _, cases, _ = captured()
        yield from (cases[name] for name in self.CASES)


def tensors(program: Program) -> dict[str, torch.Tensor]:
    """All tensors of all graphs."""
    return {
        f"{name}.{key}": tensor
        for name, graph in program.graphs.items()
        for key, tensor in graph.module.state_dict().items()
    }


@given(st.lists(st.integers(0, 3), max_size=12), SIZES)
def test_turns_are_in_the_order_of_samples(calls: list[int], size: int) -> None:
    """calls[i]: how often sample i calls the graph."""
    numbers = [
        [number for number in range(rank, len(calls), size) for _ in range(calls[number])] for rank in range(size)
    ]
    found = turns(numbers)
    assert all(len(set(turn)) == len(turn) for turn in found)
    waiting = [iter(own) for own in numbers]
    order = [next(waiting[rank]) for turn in found for rank in turn]
    assert order == [number for number, count in enumerate(calls) for _ in range(count)]
    if set(calls) == {1}:
        assert len(found) == -(-len(calls) // size)


@given(st.lists(st.integers(1, 100), max_size=20), SIZES)
def test_shares_are_alike(costs: list[int], size: int) -> None:
    owners = shares(costs, size)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    # The last item of the heaviest rank went to the lightest at that time.
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_windows_lose_nothing(items: list[int], size: int) -> None:
    found = list(windows(items, size))
    assert [item for window in found for item in window] == items
    assert all(len(window) == size for window in found[:-1]) and all(found)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 3))
def test_work_is_spread_once_and_results_are_in_order(items: list[int], size: int) -> None:
    done: list[tuple[int, int]] = []

    def squares(ranks: Ranks) -> list[tuple[int, int]]:
        def work(place: int) -> int:
            done.append((ranks.rank, place))
            return items[place] ** 2

        return list(ranks.spread(range(len(items)), lambda place: items[place], work))

    expected = [(place, item**2) for place, item in enumerate(items)]
    assert on_ranks(size, squares) == [expected] * size
    assert sorted(place for _, place in done) == list(range(len(items)))
    if len(items) >= size:
        assert {rank for rank, _ in done} == set(range(size))


@given(st.integers(0, 9), SIZES)
def test_what_is_mine_is_merged_in_order(count: int, size: int) -> None:
    def own(ranks: Ranks) -> list[int]:
        return ranks.merged([number for number in range(count) if ranks.mine(number)])

    assert on_ranks(size, own) == [list(range(count))] * size


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(2, 4), st.booleans())
def test_sums_are_those_of_one_process(lengths: list[int], size: int, moments: bool) -> None:
    """To the last bit: float32 sums in another order would differ."""
    made = torch.Generator().manual_seed(len(lengths))
    widths = {"a": 5, "b": 16, "c": 3}
    values = [
        {site: torch.randn(1, length, width, generator=made) * 10 ** (number % 3) for site, width in widths.items()}
        for number, length in enumerate(lengths)
    ]
    counts = [torch.rand(1, length, generator=made) < 0.8 for length in lengths]

    # As of an earlier graph with one of the sites.
    before = {"b": InputStatistics.empty(16, moments)}
    before["b"].add(torch.ones(1, 3, 16), 2)

    def grown(ranks: Ranks) -> dict[str, InputStatistics]:
        sums = SiteSums(ranks, widths, moments, keep=2, before=before)
        own = iter(range(ranks.rank, len(lengths), ranks.size))
        for turn in turns([list(range(rank, len(lengths), ranks.size)) for rank in range(ranks.size)]):
            if ranks.rank in turn:
                number = next(own)
                for site, value in values[number].items():
                    sums.add(site, value, ~counts[number], counts[number])
            sums.end_turn(turn)
        return sums.take(torch.device("cpu"))

    whole = grown(Ranks())
    assert list(whole) == list(widths)
    assert whole["b"].tokens == whole["a"].tokens + 3 and before["b"].tokens == 3
    for found in on_ranks(size, grown):
        assert list(found) == list(whole)
        for site, statistics in found.items():
            expected = whole[site].tensors()
            assert {*statistics.tensors()} == {*expected}
            assert all(torch.equal(tensor, expected[name]) for name, tensor in statistics.tensors().items())


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("moments", "largest"), [(False, torch.inf), (True, torch.inf), (True, 1e25)])
def test_numbers_that_are_not_finite_are_refused(moments: bool, largest: float, tokens: int) -> None:
    """Nor those whose second moments are not, held as tokens or as a matrix."""
    sums = SiteSums(Ranks(), {"layer.3": 8}, moments, keep=1, before={})
    sums.add("layer.3", torch.tensor([[1.0] * 7 + [largest]]).expand(tokens, -1))
    with pytest.raises(CalibrationError, match="not finite"):
        sums.take(torch.device("cpu"))


def test_ranks_that_differ_are_named() -> None:
    def told(ranks: Ranks) -> str:
        with pytest.raises(RankError) as caught:
            ranks.agree("the recipe", lambda: f"bits: 4\nseed: {ranks.rank}")
        return str(caught.value)

    first, second = on_ranks(2, told)
    assert "the recipe must be the same on all ranks: rank 1 has seed: 1, rank 0 has seed: 0" in first
    assert "rank 0 has seed: 0, rank 1 has seed: 1" in second
    on_ranks(2, lambda ranks: ranks.agree("the recipe", lambda: "bits: 4"))


def test_who_has_ended_is_named() -> None:
    ranks = Ranks(0, 3)
    assert "an exchange with the other ranks failed: broken pipe" in str(ended(ranks, "broken pipe\nat pair.cc"))
    ranks.lost.note(2)
    ranks.lost.note(1)
    assert "rank 2 has ended before the compile was done" in str(ended(ranks))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("quantize.transform=flatquant", "quantize.training.epochs=1"), id="trained"),
        pytest.param(
            ("tokens.method=quota", "tokens.keep=0.5", "quantize.scaling=mbq", "quantize.smooth=null"), id="cut"
        ),
        pytest.param(MEASURED, id="searched", marks=pytest.mark.slow),
    ],
)
def test_every_rank_ends_with_the_program_of_one_process(settings: tuple[str, ...], tmp_path: Path) -> None:
    """Three samples on two ranks; then resumed on three, from what two have saved."""
    captured()

    def compiled(ranks: Ranks) -> Program:
        program = fresh(changed_recipe("w4a4kv4", "quantize.kv_cache.center=true", *settings))
        program.ranks = ranks
        if ranks.size > 1:
            program.checkpoint = Checkpoint.open(tmp_path, "key", ranks)
        run_passes(program, passes(Three(), len(Three.CASES)))
        return program

    def same(found: Program) -> None:
        assert found.plan == whole.plan
        expected, given_ = tensors(whole), tensors(found)
        assert list(given_) == list(expected)
        assert all(torch.equal(given_[name], expected[name]) for name in expected)

    whole = compiled(Ranks())
    for found in on_ranks(2, compiled):
        same(found)
    for path in sorted(tmp_path.glob("*.safetensors"))[::3]:
        path.unlink()
    for found in on_ranks(3, compiled):
        same(found)


def test_a_copy_of_a_program_is_of_the_same_ranks() -> None:
    """Evaluations compile copies; what waits for other processes cannot be copied."""
    ranks = Ranks(1, 3)
    assert copy.deepcopy({"ranks": ranks})["ranks"] is ranks
    program = fresh(Recipe.load("none"))
    assert copy.deepcopy(program).ranks is program.ranks
