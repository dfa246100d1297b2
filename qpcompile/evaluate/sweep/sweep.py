"""Compute all rows of a sweep, in this process or on Ray; an interrupted sweep resumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qpcompile.errors import ArtifactError
from qpcompile.evaluate.questions.data_sets import read_data
from qpcompile.evaluate.run.evaluation import Exam, source_digest
from qpcompile.evaluate.run.examiner import Examiner
from qpcompile.evaluate.run.row_runner import Ask, InProcess, Outcome, RowRunner, all_rows
from qpcompile.evaluate.run.rows import Row, RowFolder
from qpcompile.evaluate.sweep.plan import Bed, Cell, SweepPlan, cells

# Rows that an error names.
NAMED = 4


@dataclass(frozen=True)
class CellResult:
    """A row and its position; or why there is none."""

    cell: Cell
    row: Row | None
    error: str = ""


def sweep(
    plan: SweepPlan,
    out: Path,
    say: Callable[[str], None],
    device: torch.device | None = None,
    runner: RowRunner | None = None,
) -> list[CellResult]:
    """Compute all rows of a plan, in `out`; `say` is called with each row and the remaining time.

    device: where compiles compute; by default the processor. runner: where rows are computed; by default here. Results
    have the plan's order, whichever row came first.

    A refused recipe (for example a share that a method's layers cannot reach) is a result without a row.

    Raises ArtifactError, before anything is computed, if rows in `out` come from other code than this, and at the end
    if the code changed while it ran: numbers of two versions are not compared.
    """
    kept = RowFolder(out)
    examiners = {bed.name: _examiner(plan, bed, kept, device) for bed in plan.beds}
    asked = list(cells(plan))
    asks = [Ask(examiners[cell.bed.name], cell.name, cell.recipe) for cell in asked]
    # Equal recipes under different names, such as an ablation's base, share a row.
    ids = {ask.id for ask in asks}
    _check_sources([kept.rows[id] for id in sorted(ids & set(kept.rows))], out)
    clock = _Clock(len(ids - set(kept.rows)))
    say(f"{len(asked)} places in tables, {len(ids)} rows, {clock.missing} of them to compute")
    found = all_rows(asks, runner or InProcess(), lambda ask, row: say(f"{clock.tick()}  {ask.name}: {_words(row)}"))
    results = [_result(cell, outcome) for cell, outcome in zip(asked, found, strict=True)]
    _check_sources([result.row for result in results if result.row is not None], out)
    kept.write_tables()
    return results


def _check_sources(rows: list[Row], out: Path) -> None:
    """Refuse rows of other code than that which runs."""
    own = source_digest()
    others = [row for row in rows if row.source != own]
    if others:
        files = " ".join(f"rows/{row.id}.json" for row in others[:NAMED]) + (" ..." if len(others) > NAMED else "")
        found = ", ".join(sorted({row.source for row in others}))
        raise ArtifactError(
            f"{len(others)} of {len(rows)} rows come from other code ({found}; this is {own}), and one table holds "
            "numbers of one version only",
            where=str(out),
            do=f"name a new folder, or remove what is to be computed again: {files}",
        )


def _result(cell: Cell, outcome: Outcome) -> CellResult:
    return CellResult(cell, outcome) if isinstance(outcome, Row) else CellResult(cell, None, outcome.what)


def _words(outcome: Outcome) -> str:
    if not isinstance(outcome, Row):
        return f"not possible: {outcome.what}"
    return f"{100 * outcome.accuracy:.1f} %, {outcome.mean_visual_tokens:.1f} tokens"


def _examiner(plan: SweepPlan, bed: Bed, kept: RowFolder, device: torch.device | None) -> Examiner:
    questions = read_data(Path(bed.data))[: plan.questions]
    exam = Exam(bed.data, questions, "choice", bed.batch_size, plan.max_new_tokens)
    return Examiner(bed.model, exam, Path(bed.calibration), kept, device)


@dataclass
class _Clock:
    """Completed rows and the estimated remaining time."""

    missing: int
    done: int = 0
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def tick(self) -> str:
        """Count one row; returns the progress as text."""
        self.done += 1
        each = (time.monotonic() - self.started) / self.done
        left = each * (self.missing - self.done)
        return f"[{self.done} of {self.missing}, {each:.0f} s a row, {left / 60:.0f} min left]"
