"""ScienceQA in its official layout: multiple-choice questions, about half of them about a picture.

    problems.json          {"7": {"question", "choices": [...], "answer": 1, "hint", "image": "image.png" or null,
                                  "subject": "natural science", "grade": "grade7", ...}}
    pid_splits.json        {"train": [...], "val": [...], "test": ["7", ...]}
    images/test/7/image.png

The prompt holds the hint, the question and the lettered choices; the answer is the letter. A question counts in the
groups of its subject, its context and its grade: COLUMNS, the columns of published tables. Source: "Learn to Explain"
(arXiv 2209.09513) and its released data set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qpcompile.capture.data_folder import Question, is_file
from qpcompile.errors import CalibrationError

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
_GRADE = "grade"
_SEE = "see docs: data, ScienceQA"
Subject = Literal["natural science", "social science", "language science"]
SUBJECTS: dict[str, str] = dict(zip(get_args(Subject), ("NAT", "SOC", "LAN"), strict=True))
# Text context is a hint, and a question may have both kinds of context.
TEXT, IMAGE, NO_CONTEXT = "TXT", "IMG", "NO"
LOWER, UPPER = "G1-6", "G7-12"
COLUMNS = (*SUBJECTS.values(), TEXT, IMAGE, NO_CONTEXT, LOWER, UPPER)
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def read_scienceqa(folder: Path, split: str = "test") -> list[Question]:
    """The questions of one split, in its order. Raises CalibrationError for what is missing."""
    problems, splits = _json(folder / PROBLEMS), _json(folder / SPLITS)
    if split not in splits:
        raise CalibrationError(
            f"there is no split {split!r}", where=str(folder / SPLITS), do=f"name one of {', '.join(splits)}"
        )
    numbers = splits[split]
    if not isinstance(numbers, list) or not all(isinstance(number, str) for number in numbers):
        raise CalibrationError(
            f"the split {split!r} is not a list of problem numbers as texts", where=str(folder / SPLITS), do=_SEE
        )
    pictures = folder / "images" / split
    return [_question(folder, pictures / number, number, problems) for number in numbers]


def _question(folder: Path, pictures: Path, number: str, problems: Mapping[str, Any]) -> Question:
    place = f"{folder / PROBLEMS}, problem {number}"
    try:
        problem = _Problem.model_validate(problems.get(number))
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(map(str, found["loc"])) or "the entry"
        raise CalibrationError(
            f"the problem is not in ScienceQA's format: {name}: {found['msg']}",
            where=place,
            do="give question, choices, answer (an index of them), subject, grade, and any hint and image",
        ) from error
    letters = tuple(ascii_uppercase[: len(problem.choices)])
    options = [f"{letter}. {choice}" for letter, choice in zip(letters, problem.choices, strict=True)]
    hinted = bool(problem.hint.strip())
    lines = [f"Context: {problem.hint}"] * hinted + [problem.question, *options, INSTRUCTION]
    image = pictures / problem.image if problem.image else None
    if image is not None and not is_file(image):
        raise CalibrationError(
            f"the picture of problem {number} is missing: {image}", where=place, do="unpack the split's pictures"
        )
    context = [TEXT] * hinted + [IMAGE] * (image is not None) or [NO_CONTEXT]
    grade = LOWER if int(problem.grade.removeprefix(_GRADE)) <= 6 else UPPER
    groups = (SUBJECTS[problem.subject], *context, grade)
    return Question(image, "\n".join(lines), letters[problem.answer], letters, place, groups)


class _Problem(BaseModel):
    """What is read of a problem; topic, lecture, solution and the like are not."""

    model_config = ConfigDict(strict=True)

    question: Annotated[str, Field(min_length=1)]
    choices: Annotated[list[str], Field(min_length=2, max_length=len(ascii_uppercase))]
    answer: Annotated[int, Field(ge=0)]
    image: str | None = None
    hint: str = ""
    subject: Subject
    grade: Annotated[str, Field(pattern=f"^{_GRADE}([1-9]|1[0-2])$")]

    @field_validator("hint", mode="before")
    @classmethod
    def _no_hint(cls, hint: Any) -> Any:
        return "" if hint is None else hint

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is not an index of {len(self.choices)} choices")
        return self


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"the file cannot be read: {error}", where=str(path), do=_SEE) from error
    if not isinstance(found, dict):
        raise CalibrationError("the file holds no JSON object", where=str(path), do=_SEE)
    return found
