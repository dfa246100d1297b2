"""Search: bisection finds the smallest share per rung, the cheapest sufficient one wins, failure is reported."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qpcompile.errors import OutputError, PlanError
from qpcompile.evaluate.run.bootstrap import Interval
from qpcompile.evaluate.run.rows import Row
from qpcompile.evaluate.search import LADDER, SHARES, Found, Trial, front, search, write_search
from qpcompile.recipe.recipe import Recipe
from tests.evaluate.full_disk import contents, fill

ASKED = 200


def row(accuracy: float, share: float) -> Row:
    right = "1" * round(ASKED * accuracy)
    return Row(
        id="0", name="", model="", data="", data_sha256="", recipe=None, seed=0, calibration_samples=0,
        calibration_sha256=None, scoring="choice", versions={}, source="", questions=ASKED, correct=len(right),
        accuracy=accuracy, right=right.ljust(ASKED, "0"), answers=(), visual_tokens=100, mean_visual_tokens=100 * share,
        final_visual_tokens=0, flops=share, flops_share=share, weight_bytes=1, kv_bytes=share, compile_seconds=0,
        answer_seconds=0, plan={}, kept=(),
    )  # fmt: skip


class Curve:
    """An examiner whose model keeps all accuracy down to a share, which is larger with 4-bit activations."""

    kept = None

    def __init__(self, refused_below: float = 0.0) -> None:
        self.asked: list[tuple[int, float]] = []
        self.refused_below = refused_below

    def id(self, recipe: Recipe | None) -> str:
        return str(recipe)

    def known(self, recipe: Recipe | None) -> None:
        return None

    def compute(self, name: str, recipe: Recipe | None) -> Row:
        if recipe is None:
            return row(1.0, 1.0)
        share = recipe.tokens.keep
        if share < self.refused_below:
            raise PlanError("the layers cannot reach this share")
        bits = 16 if recipe.quantize is None else recipe.quantize.activations.bits
        self.asked.append((bits, share))
        return row(0.98 if share >= (0.3 if bits == 16 else 0.6) else 0.5, share)


def find(curve: Any, accuracy: float, say: Callable[[str], None] = lambda _: None) -> Found:
    return search(curve, Recipe.load("quota-30"), accuracy, say)


def test_the_cheapest_good_recipe() -> None:
    curve = Curve()
    found = find(curve, 0.97)
    # 0.6 x 4 x 4 is less than 0.3 x 4 x 16.
    assert (found.best.bits, found.best.share) == ("W4A4KV4", 0.6)
    assert {min(share for bits, share in curve.asked if bits == 16 and share >= 0.3)} == {0.3}
    assert len(curve.asked) <= len(LADDER) * 5 < len(LADDER) * len(SHARES)


def test_a_refused_share_is_not_enough() -> None:
    told: list[str] = []
    found = find(Curve(refused_below=0.7), 0.97, told.append)
    assert (found.best.bits, found.best.share) == ("W4A4KV4", 0.7)
    assert any("not possible: the layers cannot reach" in line for line in told)


def test_what_no_recipe_reaches() -> None:
    with pytest.raises(PlanError, match=r"no recipe keeps 99 %.*the best keeps 98\.0 %"):
        find(Curve(), 0.99)
    with pytest.raises(PlanError, match="nothing to search"):
        search(Curve(), Recipe.load("w4a4kv4"), 0.9, lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="begins with 4-bit"):
        search(Curve(), Recipe.load("quota-30-w4a8"), 0.9, lambda _: None)  # type: ignore[arg-type]


def test_front_and_files(tmp_path: Path) -> None:
    found = find(Curve(), 0.97)
    best = front(found.trials)
    assert found.best in best
    assert all(a.cost <= b.cost and a.kept.estimate < b.kept.estimate for a, b in pairwise(best))
    write_search(found, tmp_path)
    assert Recipe.load(tmp_path / "recipe.yaml") == found.best.recipe
    assert (tmp_path / "search.md").read_text().count("chosen") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "search.md", "pareto.png", "pareto.svg"}


@pytest.mark.parametrize("after", [0, 2])
def test_full_disk_leaves_whole_files(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("W4A4KV4", 0.6, Recipe.load("quota-30"), row(0.98, 0.6), Interval(0.98, 0.97, 0.99))
    found = Found((trial,), trial, 0.97)
    write_search(found, tmp_path / "whole")
    with monkeypatch.context() as full, pytest.raises(OutputError, match="disk is full") as caught:
        fill(full, after)
        write_search(found, tmp_path / "out")
    whole, left = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert left == {name: whole[name] for name in left} and len(left) == after
    assert caught.value.where and caught.value.do
    write_search(found, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_full_disk_ends_a_search() -> None:
    class Full(Curve):
        def compute(self, name: str, recipe: Recipe | None) -> Row:
            if recipe is not None and recipe.tokens.keep < 1:
                raise OutputError("the disk is full")
            return super().compute(name, recipe)

    with pytest.raises(OutputError, match="disk is full"):
        find(Full(), 0.97)
