"""Every method of the recipe has its file, and a file is all that the compiler needs of a method."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import qpcompile.pruning.methods as methods
from qpcompile.cli.doctor import CHOOSES_BY
from qpcompile.pruning.table import PRUNERS, read_methods
from qpcompile.recipe.tokens import TokenScheme

LATEST = """
from qpcompile.pruning.methods.fastv import FastV

METHODS = {"latest": FastV()}
"""


def test_methods_are_those_of_the_recipe() -> None:
    assert {"none", *PRUNERS} == set(get_args(TokenScheme.model_fields["method"].annotation))
    assert set(CHOOSES_BY) < set(PRUNERS)


def test_a_file_adds_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latest.py").write_text(LATEST, "utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert set(read_methods()) == {*PRUNERS, "latest"}
