"""Rows: complete or absent, identified by everything they depend on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qpcompile.cli.evaluate import recipe_rows, table_cells
from qpcompile.errors import ArtifactError
from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.evaluate.run import examiner as examiner_module
from qpcompile.evaluate.run.evaluation import Exam
from qpcompile.evaluate.run.examiner import Examiner
from qpcompile.evaluate.run.rows import Row, RowFolder
from qpcompile.recipe.recipe import Recipe

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
MODEL, DATA = str(TESTBED / "llava"), TESTBED / "calibration" / "llava"
FAST = ["calibration.samples=1", "quantize.weights.solver=rtn", "quantize.transform=hadamard"]
ASKED = 6


def exam(count: int = ASKED) -> Exam:
    return Exam(str(DATA), read_data(DATA)[:count], "choice", 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full precision and one recipe with two seeds."""
    out = tmp_path_factory.mktemp("rows")
    recipe_rows(Examiner(MODEL, exam(), DATA, RowFolder(out)), ["quota-30"], FAST, [0, 1])
    return out


@pytest.mark.slow
def test_what_a_row_holds(folder: Path) -> None:
    rows = list(RowFolder(folder).rows.values())
    full = next(row for row in rows if row.recipe is None)
    first, second = sorted((row for row in rows if row.recipe), key=lambda row: row.seed or 0)
    assert (full.plan, full.seed, full.flops_share) == ({}, None, 1)
    assert full.visual_tokens == full.mean_visual_tokens == full.final_visual_tokens == 144
    assert (first.seed, second.seed) == (0, 1) and first.calibration_sha256 != second.calibration_sha256
    assert first.recipe is not None and first.recipe["tokens"]["keep"] == 0.3
    for row in (first, second):
        assert row.final_visual_tokens == 44 < row.mean_visual_tokens < 144 and 0 < row.flops_share < 1
        assert row.weight_bytes < 0.4 * full.weight_bytes and row.kv_bytes < 0.5 * full.kv_bytes
        assert len(row.right) == len(row.answers) == ASKED and row.correct == row.right.count("1")
        cut = max({layer for kept in row.kept for layer in kept}, key=int)
        assert all(len(kept[cut]) == 44 and max(kept[cut]) < 144 for kept in row.kept)
        assert row.versions.keys() == {"qpcompile", "torch", "transformers"} and row.plan["cuts"]


@pytest.mark.slow
def test_files_say_the_same(folder: Path) -> None:
    rows = RowFolder(folder).rows
    assert {row["id"] for row in json.loads((folder / "rows.json").read_text())} == set(rows)
    with (folder / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["id"], float(line["accuracy"])) for line in lines} == {
        (row.id, row.accuracy) for row in rows.values()
    }


@pytest.mark.slow
def test_nothing_is_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examiner_module, "evaluate", lambda *_, **__: pytest.fail("computed again"))
    rows = recipe_rows(Examiner(MODEL, exam(), DATA, RowFolder(folder)), ["quota-30"], FAST, [1, 0])
    assert [row.seed for row in rows] == [None, 1, 0]
    assert table_cells(rows)[0][4] == "-" and "(" in table_cells(rows)[1][4]


def test_an_id_depends_on_all_that_matters(tmp_path: Path) -> None:
    recipe = Recipe.load("quota-30")
    here = Examiner(MODEL, exam(), DATA)
    others = [
        here.id(None),
        here.id(recipe.with_overrides(["calibration.seed=1"])),
        here.id(recipe.with_overrides(["tokens.keep=0.4"])),
        Examiner(MODEL, exam(5), DATA).id(recipe),
        Examiner(MODEL, exam(), None).id(recipe),
        Examiner(str(TESTBED / "llava-outliers"), exam(), DATA).id(recipe),
        Examiner(MODEL, Exam(str(DATA), exam().questions, "text", 3, 4), DATA).id(recipe),
    ]
    assert len({here.id(recipe), *others}) == 1 + len(others)
    elsewhere = tmp_path / "link"
    elsewhere.symlink_to(MODEL)
    assert Examiner(str(elsewhere), exam(), DATA).id(recipe) == here.id(recipe)


@pytest.mark.slow
def test_a_half_written_row_is_no_row(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    whole = next(iter((folder / "rows").glob("*.json")))
    (rows / f".{whole.name}.0123.partial").write_bytes(whole.read_bytes()[:100])
    assert RowFolder(tmp_path).rows == {}
    (rows / whole.name).write_bytes(whole.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="row cannot be read"):
        RowFolder(tmp_path)


@pytest.mark.slow
def test_ctrl_c_keeps_the_rows_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real = examiner_module.evaluate

    def evaluate(*arguments: Any, name: str, **options: Any) -> Row:
        if done:
            raise KeyboardInterrupt
        done.append(name)
        return real(*arguments, name=name, **options)

    monkeypatch.setattr(examiner_module, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        recipe_rows(Examiner(MODEL, exam(2), DATA, RowFolder(tmp_path)), ["none"], ["calibration.samples=1"], [])
    assert [row.name for row in RowFolder(tmp_path).rows.values()] == done == ["full precision"]


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL after the first row; the second run keeps that row's file and computes the others."""
    words = ["eval", MODEL, "--data", str(DATA), "--limit", "4", "--max-new-tokens", "4", "--out", str(tmp_path)]
    words += ["--recipe", "w4a4kv4", "--calibration", str(DATA), *(word for key in FAST for word in ("--set", key))]
    command = [sys.executable, "-c", "from qpcompile.cli.main import main; main()", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (found := list((tmp_path / "rows").glob("[!.]*.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(found) == 1, "the second row takes longer than the loop above"
    before = found[0].stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert found[0].stat().st_mtime_ns == before and len(list((tmp_path / "rows").glob("[!.]*.json"))) == 2
