"""Read questions from a folder in any supported layout, and hash them for identification."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from qpcompile.capture.data_folder import DATA_FILE, Question, check_pictures, read_questions
from qpcompile.errors import CalibrationError
from qpcompile.evaluate.questions.scienceqa import PROBLEMS, read_scienceqa


def read_data(folder: Path, split: str = "test") -> list[Question]:
    """The questions of a data folder (`data.jsonl`) or of ScienceQA (`problems.json`), where `split` is read."""
    if (folder / DATA_FILE).is_file():
        questions = read_questions(folder)
    elif (folder / PROBLEMS).is_file():
        questions = read_scienceqa(folder, split)
    else:
        raise CalibrationError(
            f"neither {DATA_FILE} nor {PROBLEMS} is in {folder}", where=str(folder), do="see docs: data"
        )
    if not questions:
        raise CalibrationError("there is no question to ask", where=str(folder), do="give at least one line of data")
    check_pictures(questions)
    return questions


def questions_digest(questions: Sequence[Question]) -> str:
    """SHA-256 over texts, answers, groups and the pictures' names and sizes, in order."""
    total = hashlib.sha256()
    for question in questions:
        line = [*_picture(question), question.question, question.answer, *question.choices]
        # Without groups the digest of earlier versions, so that their rows are found.
        total.update(json.dumps([*line, question.groups] if question.groups else line).encode())
    return total.hexdigest()


def _picture(question: Question) -> tuple[str | None, int]:
    """The name and the size in bytes of a question's picture."""
    if question.image is None:
        return None, 0
    try:
        return question.image.name, question.image.stat().st_size
    except OSError as error:
        raise CalibrationError(
            f"the picture {question.image} cannot be read any more: {error.strerror}",
            where=question.where,
            do="put it back, and leave the folder as it is while it is asked",
        ) from error


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all files directly in a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
