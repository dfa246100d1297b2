"""Result rows: one atomically written file per row in a folder, and one table over all of them.

    DIR/rows/<id>.json      a complete row, written to a temporary name and renamed
    DIR/rows.json, .csv     all rows; the CSV without answers and plans

`id` is a hash of what the row depends on: model, recipe with its seed, questions, scoring and versions. An existing row
is not recomputed, so an interrupted run resumes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from qpcompile.errors import ArtifactError
from qpcompile.files import replace_file, write_new_file
from qpcompile.recipe.quantize import Section

FULL_PRECISION = "full precision"
# choice: the most probable choice where a question has choices; text: the choice that the freely generated text names.
Scoring = Literal["choice", "text"]


class GroupScore(Section):
    """Right answers to a group of questions."""

    right: int = Field(ge=0, description="Right answers.")
    questions: int = Field(ge=1, description="Questions of the group.")

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.questions


class Row(Section):
    """One model under one recipe on one set of questions. Sizes are means over questions that have a picture; over all
    where none has one.
    """

    id: str = Field(description="Hash of all that the result depends on.")
    name: str = Field(description="Name of the row in tables.")
    model: str = Field(description="Folder or hub name.")
    data: str = Field(description="Folder of the questions.")
    data_sha256: str = Field(description="Hash of the questions.")
    recipe: dict[str, Any] | None = Field(description="The whole recipe; null: full precision.")
    seed: int | None = Field(description="Seed of the calibration draw; null: nothing was drawn.")
    calibration_samples: int = Field(description="Samples used.")
    calibration_sha256: str | None = Field(description="Hash of the samples.")
    scoring: Scoring = Field(description="How answers were scored.")
    versions: dict[str, str] = Field(description="Packages.")
    source: str = Field(description="Hash of the package's own code, which `id` leaves out.")
    questions: int = Field(ge=1, description="Questions asked.")
    correct: int = Field(ge=0, description="Right answers.")
    accuracy: float = Field(ge=0, le=1, description="correct / questions.")
    right: str = Field(pattern="^[01]+$", description="One digit per question: 1 right.")
    answers: tuple[str, ...] = Field(strict=False, description="The answers.")
    groups: dict[str, GroupScore] = Field(default_factory=dict, description="Group of questions -> its score.")
    visual_tokens: float = Field(description="Visual tokens of a prompt.")
    mean_visual_tokens: float = Field(description="Visual tokens that a decoder layer processes, mean over layers.")
    final_visual_tokens: float = Field(description="Visual tokens that the last layer processes.")
    flops: float = Field(description="Operations of a prompt: tower, projector, decoder layers.")
    flops_share: float = Field(description="The same over those with all visual tokens in every layer.")
    weight_bytes: int = Field(description="All weights; floating-point weights as fp16, scales as stored.")
    kv_bytes: float = Field(description="The cache of an answer at its end; 16-bit caches as fp16.")
    compile_seconds: float = Field(description="Time to compile, without shared measurements.")
    answer_seconds: float = Field(description="Time to answer all questions.")
    plan: dict[str, Any] = Field(description="Cuts and measurements per layer; empty: full precision.")
    kept: tuple[dict[str, list[int]], ...] = Field(
        strict=False, description="Of the first questions: layer -> raster indices of the visual tokens after its cut."
    )

    @property
    def marks(self) -> list[float]:
        """1.0 per right answer, else 0.0, in the order of the questions."""
        return [float(mark) for mark in self.right]


def row_id(parts: Mapping[str, Any]) -> str:
    """Hash of what a row depends on, 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class RowFolder:
    """The rows of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, Row] = {}
        for path in sorted((folder / "rows").glob("*.json")):
            row = _read(path)
            self.rows[row.id] = row

    def get(self, row: str) -> Row | None:
        """A stored row, if it exists."""
        return self.rows.get(row)

    def add(self, row: Row) -> None:
        """Store a new row, and rewrite the table over all rows."""
        write_new_file(self.folder / "rows" / f"{row.id}.json", _json(row.model_dump(mode="json")))
        self.rows[row.id] = row
        self.write_tables()

    def write_tables(self) -> None:
        """Rewrite the table over all rows: a run interrupted between a row and its table has left an older one.

        Sorted by id: rows come in any order from workers and from interrupted runs.
        """
        rows = [row.model_dump(mode="json") for _, row in sorted(self.rows.items())]
        replace_file(self.folder / "rows.json", _json(rows))
        replace_file(self.folder / "rows.csv", _csv(rows))


def _read(path: Path) -> Row:
    try:
        return Row.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        raise ArtifactError(
            f"the row cannot be read: {str(error).splitlines()[0]}",
            where=str(path),
            do="remove this file and run again, or name a new folder",
        ) from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    """All scalar fields, recipe and versions as text, and accuracy and questions of each group."""
    text = io.StringIO()
    apart = ("recipe", "versions", "answers", "groups", "plan", "kept")
    heads = [name for name in Row.model_fields if name not in apart]
    lines = [
        {name: row[name] for name in heads}
        | {name: json.dumps(row[name]) for name in ("recipe", "versions")}
        | {head: value for name, score in row["groups"].items() for head, value in _group_cells(name, score)}
        for row in rows
    ]
    found = dict.fromkeys(head for line in lines for head in line)
    writer = csv.DictWriter(text, list(dict.fromkeys([*heads, "recipe", "versions", *found])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


def _group_cells(name: str, score: dict[str, int]) -> list[tuple[str, float]]:
    return [
        (f"accuracy of {name}", score["right"] / score["questions"]),
        (f"questions of {name}", score["questions"]),
    ]
