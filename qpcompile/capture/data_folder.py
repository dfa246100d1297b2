"""A data set on disk: pictures and `data.jsonl` with one question per line.

    {"image": "00000.png", "question": "what color is the star?", "answer": "red", "choices": ["red", "blue"]}

`choices` is optional. A line becomes model inputs through the model's own processor and chat template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qpcompile.errors import CalibrationError

DATA_FILE = "data.jsonl"


@dataclass(frozen=True)
class Question:
    """One line of a data folder."""

    image: Path
    question: str
    answer: str
    choices: tuple[str, ...] = ()


def read_questions(folder: Path) -> list[Question]:
    """All lines of a data folder. Raises CalibrationError that names the line for what is missing or malformed."""
    path = folder / DATA_FILE
    if not path.is_file():
        raise CalibrationError(f"there is no {DATA_FILE} in {folder}", where=str(folder), do="see docs: data folders")
    questions = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
            choices = tuple(entry.get("choices", ()))
            question = Question(folder / entry["image"], entry["question"], entry["answer"], choices)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"the line is no question: {error!r}", where=where, do="give image, question and answer as JSON"
            ) from error
        if not question.image.is_file():
            raise CalibrationError(f"the picture {entry['image']} is missing", where=where, do="put it in the folder")
        questions.append(question)
    return questions


def first_pictures(folder: Path, count: int) -> list[tuple[Path, str]]:
    """The first `count` pictures of a data folder, each with the first question about it."""
    first: dict[Path, str] = {}
    for question in read_questions(folder):
        first.setdefault(question.image, question.question)
    return list(first.items())[:count]


def question_inputs(processor: Any, questions: Sequence[Question]) -> dict[str, Any]:
    """Model inputs for a batch of questions, padded, as `model.generate` takes them."""
    pictures = [_picture(question.image) for question in questions]
    texts = [prompt(processor, question.question) for question in questions]
    return dict(processor(images=pictures, text=texts, return_tensors="pt", padding=True))


def prompt(processor: Any, question: str) -> str:
    """The text of one question about one picture, by the processor's chat template."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    if getattr(processor, "chat_template", None) is None:
        raise CalibrationError(
            "the processor has no chat template, so a question cannot be turned into a prompt",
            where=type(processor).__name__,
            do="give calibration samples as model inputs instead of a folder",
        )
    return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the file cannot be read: {error}", where=str(path), do="save it as UTF-8") from error


def _picture(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise CalibrationError(
            f"the file is no picture that can be read: {error}", where=str(path), do="replace it, or take its line out"
        ) from error
