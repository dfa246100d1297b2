"""ScienceQA in its official layout: multiple-choice questions about pictures.

    problems.json          {"7": {"question", "choices": [...], "answer": 1, "hint", "image": "image.png" or null, ...}}
    pid_splits.json        {"train": [...], "val": [...], "test": ["7", ...]}
    images/test/7/image.png

Questions without a picture are left out. The prompt holds the hint, the question and the lettered choices; the answer
is the letter. Source: "Learn to Explain" (arXiv 2209.09513) and its released data set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from qpcompile.capture.data_folder import Question
from qpcompile.errors import CalibrationError

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def read_scienceqa(folder: Path, split: str = "test") -> list[Question]:
    """The questions with pictures of one split, in its order. Raises CalibrationError for what is missing."""
    problems, splits = _json(folder / PROBLEMS), _json(folder / SPLITS)
    if split not in splits:
        raise CalibrationError(
            f"there is no split {split!r}", where=str(folder / SPLITS), do=f"name one of {', '.join(splits)}"
        )
    return [
        _question(folder / "images" / split / number, number, problems[number])
        for number in splits[split]
        if problems.get(number, {}).get("image")
    ]


def _question(folder: Path, number: str, problem: Mapping[str, Any]) -> Question:
    try:
        letters = tuple(ascii_uppercase[: len(problem["choices"])])
        options = [f"{letter}. {choice}" for letter, choice in zip(letters, problem["choices"], strict=True)]
        hint = problem.get("hint") or ""
        lines = [f"Context: {hint}"] * bool(hint.strip()) + [problem["question"], *options, INSTRUCTION]
        question = Question(folder / problem["image"], "\n".join(lines), letters[problem["answer"]], letters)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise CalibrationError(
            f"the problem is not in ScienceQA's format: {error!r}",
            where=f"{PROBLEMS}, problem {number}",
            do="give question, choices, answer (an index) and image",
        ) from error
    if not question.image.is_file():
        raise CalibrationError(
            f"the picture of problem {number} is missing", where=str(question.image), do="unpack the split's pictures"
        )
    return question


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"the file cannot be read: {error}", where=str(path), do="see docs: data, ScienceQA"
        ) from error
