"""Whether a generated text is the right answer to a question of a data folder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qpcompile.capture.data_folder import Question

# "B", "B.", "(B) because", "The answer is B."
_LETTER = re.compile(r"^\(?([A-Z])(?:[.):]|\s|$)|answer is:?\s*\(?([A-Z])\b")


def right_answers(questions: Sequence[Question], answers: Sequence[str]) -> list[bool]:
    """Whether each answer is right, in order."""
    return [is_right(question, answer) for question, answer in zip(questions, answers, strict=True)]


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer equals the ground truth; text that names one of the choices counts as that choice."""
    given = answer.strip()
    if question.choices:
        given = named_choice(given, question.choices) or given
    return given == question.answer.strip()


def named_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a generated text names: the choice itself, in any case, or its letter; None if not unique."""
    plain = text.strip().rstrip(".").casefold()
    same = [choice for choice in choices if choice.strip().casefold() == plain]
    if len(same) == 1:
        return same[0]
    found = _LETTER.search(text.strip())
    letter = next(filter(None, found.groups()), None) if found else None
    return letter if letter in choices else None
