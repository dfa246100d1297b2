"""Data folders: pictures and `data.jsonl` with one question per line (format: `data_line.py`).

A line is converted to model inputs by the model's own processor and chat template.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpcompile.capture.chat import Conversation, about_picture, chat_inputs, check_texts
from qpcompile.capture.data_line import MOST_LINE_BYTES, LineError, parse_line
from qpcompile.errors import CalibrationError
from qpcompile.picture import check_picture, read_picture

DATA_FILE = "data.jsonl"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Question:
    """One line of a data folder, or a problem of ScienceQA, which may have no picture.

    `place` is its location in errors: the file and the line. `groups` are those it counts in.
    """

    image: Path | None
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    place: str = field(default="", compare=False)
    groups: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The place; for a question that is not from a file the picture's path, or the text."""
        return self.place or str(self.image or self.question[:80])

    @property
    def picture(self) -> Path:
        """The path of the picture of a question that has one, as every question of a data folder does."""
        assert self.image is not None
        return self.image


def read_questions(folder: Path) -> list[Question]:
    """All lines of a data folder, each validated, including that its picture exists.

    Pictures are relative to the folder. A data folder is the user's own: absolute paths, `..` and links are followed.

    Raises CalibrationError naming the file, the first invalid line, its key, and the number of invalid lines.
    """
    path = folder / DATA_FILE
    if not is_file(path):
        raise CalibrationError(f"there is no {DATA_FILE} in {folder}", where=str(folder), do="see docs: data folders")
    questions: list[Question] = []
    wrong: list[tuple[str, LineError]] = []
    for number, raw in _lines(path):
        place = f"{path}, line {number}"
        try:
            questions.append(_question(folder, raw, place))
        except LineError as error:
            wrong.append((place, error))
    if wrong:
        (place, first), others = wrong[0], len(wrong) - 1
        more = f" ({others} more {'lines are' if others > 1 else 'line is'} wrong)" if others else ""
        raise CalibrationError(f"the line is not a question: {first}{more}", where=place, do=first.do)
    return questions


def first_pictures(folder: Path, count: int) -> list[tuple[Path, str]]:
    """The first `count` pictures of a data folder, each with the first question about it."""
    first: dict[Path, str] = {}
    for question in read_questions(folder):
        first.setdefault(question.picture, question.question)
    return list(first.items())[:count]


def check_pictures(questions: Sequence[Question]) -> None:
    """Refuse files that are not pictures, judging by their headers."""
    for image, where in {question.image: question.where for question in reversed(questions)}.items():
        if image is not None:
            check_picture(image, where=where)


def check_questions(processor: Any, questions: Sequence[Question]) -> None:
    """Checks that need no decoding: refuse files that are not pictures, and texts with special tokens."""
    check_pictures(questions)
    for question in questions:
        check_texts(processor, (question.question, *question.choices), question.where)


def question_inputs(processor: Any, questions: Sequence[Question]) -> dict[str, Any]:
    """Model inputs for a batch of questions, padded on the left, as `model.generate` takes them."""
    return chat_inputs(processor, [_conversation(each) for each in questions], [each.where for each in questions])


def _conversation(question: Question) -> Conversation:
    picture = None if question.image is None else read_picture(question.image, where=question.where)
    return about_picture(picture, question.question)


def _question(folder: Path, raw: bytes, place: str) -> Question:
    line = parse_line(raw)
    image = folder / line.image
    if not is_file(image):
        do = "put it in the folder" if "://" not in line.image else "pictures are files: load it into the folder first"
        raise LineError(f"the picture {line.image[:200]} is missing, or is not a file", do)
    return Question(image, line.question, line.answer, line.choices, place, line.groups)


def is_file(path: Path) -> bool:
    """Whether a regular file exists; False for an invalid path."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every non-blank line. Only a line feed ends a line: JSON text may contain U+2028."""
    number = 0
    try:
        with path.open("rb") as file:
            # One byte more than allowed: a longer line is refused, and its rest is skipped.
            while raw := file.readline(MOST_LINE_BYTES + 2):
                number += 1
                rest = raw
                while not rest.endswith(b"\n") and (rest := file.readline(MOST_LINE_BYTES)):
                    pass
                text = raw.removeprefix(_BOM) if number == 1 else raw
                if text.strip():
                    yield number, text.rstrip(b"\r\n")
    except OSError as error:
        raise CalibrationError(
            f"the file cannot be read: {error.strerror}", where=str(path), do="check its permissions"
        ) from error
