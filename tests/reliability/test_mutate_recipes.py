"""The short form of mutate_recipes.py, and a check that it detects what it looks for."""

from pathlib import Path

import pytest
from reliability.mutate_recipes import KINDS, Result, examine, mutate

from qpcompile.errors import RecipeError
from qpcompile.recipe.recipe import Recipe

COUNT = 300


def test_damaged_recipes_are_read_or_refused_in_full(tmp_path: Path) -> None:
    results = mutate(COUNT, seed=1, folder=tmp_path)
    assert [text for found in results.values() for text in found.wrong] == []
    assert sum(found.loaded + found.refused for found in results.values()) == COUNT
    assert all(found.refused for found in results.values()) and results.keys() == KINDS.keys()
    assert sum(found.loaded for found in results.values()) > 10


@pytest.mark.parametrize(
    "error", [ValueError("raw"), RecipeError("no where"), RecipeError("long" * 1000, where="a", do="b")]
)
def test_what_is_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(source: object) -> Recipe:
        raise error

    monkeypatch.setattr(Recipe, "load", fails)
    result = Result()
    examine(tmp_path, result)
    assert len(result.wrong) == 1
