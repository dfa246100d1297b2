"""`export --for compressed-tensors`: what is refused before anything is compiled, and one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qpcompile.cli import main as cli

MODEL = str(Path(__file__).resolve().parents[1] / "testbed" / "llava")


def export(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["export", MODEL, "--for", "compressed-tensors", *map(str, arguments)])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled; nothing is."""
    found: list[Any] = []

    class Compiled:
        def export_compressed_tensors(self, folder: Path) -> None:
            found.append(folder)

    def compile_(model: str, recipe: Any, **_: Any) -> Compiled:
        found.append(recipe.quantize.weights.bits)
        return Compiled()

    monkeypatch.setattr("qpcompile.pipeline.compile", compile_)
    return found


def test_a_recipe_is_refused_before_the_compile(compiled: list[Any], tmp_path: Path) -> None:
    result = export("--recipe", "quota-30", "--output", tmp_path / "out")
    assert result.exit_code == 1 and "--set tokens.method=none" in result.output
    assert not compiled and not (tmp_path / "out").exists()


def test_onnxruntimes_operators_do_not_belong_to_it(compiled: list[Any], tmp_path: Path) -> None:
    assert export("--recipe", "w4a16", "--fast", "--output", tmp_path / "out").exit_code == 2
    assert not compiled


def test_a_model_is_compiled_and_written(compiled: list[Any], tmp_path: Path) -> None:
    result = export("--recipe", "w4a16", "--output", tmp_path / "out")
    assert result.exit_code == 0 and f"{tmp_path / 'out'}/README.md" in result.output
    assert compiled[0] == 4 and len(compiled) == 2
