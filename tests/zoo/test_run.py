"""Runs of many families: several at a time, each with its time, and only what has ended counts."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import one
import run

STEPS = ["build", "capture"]


def stand_in(name: str, target: Path, steps: list[str], shape: str = "standard") -> None:
    """A family: the name says how it ends."""
    row = {step: {"result": "ok", "seconds": 0.1, "reason": ""} for step in steps}
    target.write_text(json.dumps(dict(list(row.items())[:1])))
    if name == "slow":
        time.sleep(60)
    if name == "dead":
        os._exit(9)
    time.sleep(0.3)
    target.write_text(json.dumps(row))


def ran(names: list[str], folder: Path, workers: int = 2, seconds: int = 3) -> dict[str, dict[str, Any]]:
    return dict(run.run_families(names, folder, STEPS, seconds, workers))


def test_each_ends_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one, "main", stand_in)
    rows = ran(["slow", "a", "dead", "b"], tmp_path)
    assert {name: [cell["result"] for cell in row.values()] for name, row in rows.items()} == {
        "slow": ["ok", "slow"],
        "a": ["ok", "ok"],
        "dead": ["ok", "died"],
        "b": ["ok", "ok"],
    }
    assert rows["dead"]["end"]["reason"] == "exit code 9"
    assert {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()} == {
        f"{name}.json": row for name, row in rows.items()
    }


def test_what_has_a_file_is_not_run_again_and_what_was_interrupted_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one, "main", stand_in)
    (tmp_path / "slow.json").write_text('{"build": {"result": "ok"}}')
    (tmp_path / "a.partial").write_text('{"build": {"result": "ok"}}')
    rows = ran(["a", "slow"], tmp_path)
    assert list(rows) == ["slow", "a"] and len(rows["slow"]) == 1 and len(rows["a"]) == len(STEPS)


def test_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that wait for each other end only if both run."""

    def waiting(name: str, target: Path, steps: list[str], shape: str) -> None:
        (tmp_path / f"{name} is here").touch()
        while len(list(tmp_path.glob("* is here"))) < 2:
            time.sleep(0.02)
        stand_in(name, target, steps)

    monkeypatch.setattr(one, "main", waiting)
    rows = ran(["a", "b"], tmp_path, seconds=30)
    assert all(len(row) == len(STEPS) and "end" not in row for row in rows.values())
