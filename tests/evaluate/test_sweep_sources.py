"""Rows of two versions of the code are not put in one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qpcompile.errors import ArtifactError
from qpcompile.evaluate.run.evaluation import source_digest
from qpcompile.evaluate.run.rows import Row, RowFolder
from qpcompile.evaluate.sweep import sweep as sweep_module
from qpcompile.evaluate.sweep.plan import SweepPlan
from qpcompile.evaluate.sweep.sweep import sweep

PLAN = """
version: 1
beds: [{name: bed, model: m, data: DATA, calibration: DATA, batch_size: 1}]
questions: 2
max_new_tokens: 1
seeds: [0]
reference: none
quantizers: {fp16: {}}
pruners: {none: {}}
"""


def a_row(source: str) -> Row:
    return Row(
        id="full", name="full", model="m", data="d", data_sha256="", recipe=None, seed=0, calibration_samples=1,
        calibration_sha256=None, scoring="choice", versions={}, source=source, questions=2, correct=1, accuracy=0.5,
        right="10", answers=(), visual_tokens=4, mean_visual_tokens=4, final_visual_tokens=4, compile_seconds=1,
        answer_seconds=1, plan={}, kept=(), flops=1.0, flops_share=1.0, weight_bytes=1, kv_bytes=1.0,
    )  # fmt: skip


@dataclass
class Examiner:
    """Computes the one row of the plan, by code with the given hash."""

    kept: RowFolder
    source: str
    asked: list[Any] = field(default_factory=list[Any])

    def id(self, recipe: Any) -> str:
        return "full"

    def known(self, recipe: Any) -> Row | None:
        return self.kept.get("full")

    def compute(self, name: str, recipe: Any) -> Row:
        self.asked.append(recipe)
        return a_row(self.source)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the sweep with code of the given hash; returns its results and what it computed."""
    data = Path(__file__).resolve().parents[1] / "testbed/calibration/llava"
    (tmp_path / "plan.yaml").write_text(PLAN.replace("DATA", str(data)))
    plan = SweepPlan.load(tmp_path / "plan.yaml")

    def go(source: str) -> tuple[list[Any], list[Any]]:
        made: list[Examiner] = []

        def examiner(_: Any, bed: Any, kept: RowFolder, device: Any) -> Examiner:
            made.append(Examiner(kept, source))
            return made[-1]

        monkeypatch.setattr(sweep_module, "_examiner", examiner)
        return sweep(plan, tmp_path / "out", lambda text: None), made[0].asked

    return go


def test_rows_of_this_code_are_taken_again(run: Any) -> None:
    first, computed = run(source_digest())
    again, nothing = run(source_digest())
    assert len(computed) == 1 and nothing == [] and first == again


def test_a_row_of_other_code_is_refused_before_anything_is_computed(run: Any, tmp_path: Path) -> None:
    RowFolder(tmp_path / "out").add(a_row("0123456789ab"))
    with pytest.raises(ArtifactError, match=r"1 of 1 rows come from other code \(0123456789ab; this is") as error:
        run(source_digest())
    assert "rows/full.json" in str(error.value.do) and error.value.where == str(tmp_path / "out")


def test_code_that_changes_meanwhile_is_refused_at_the_end(run: Any) -> None:
    with pytest.raises(ArtifactError, match="other code"):
        run("changed")
