"""Exact-match accuracy of a model: greedily generated text against the answer, in padded batches.

accuracy = answers equal to the ground truth, white space at the ends aside / questions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qpcompile.capture.data_folder import Question, check_questions, question_inputs
from qpcompile.errors import CalibrationError
from qpcompile.progress import track
from qpcompile.runtime.model_inputs import new_tokens

# (**model inputs, max_new_tokens=...) -> i64[B, S + T], the decoder's prompt and the answer, as a tensor or an array.
Generate = Callable[..., Any]


@dataclass(frozen=True)
class Score:
    """The number of right answers to `total` questions, and all answers, in order."""

    correct: int
    total: int
    answers: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.total


def accuracy(
    generate: Generate,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int = 16,
    *,
    max_new_tokens: int = 16,
    name: str = "answer",
) -> Score:
    """Ask every question.

    Args:
        generate: `generate` of a transformers model or of a compiled one, or `on_numpy(runner)`.
        processor: the processor of that model.
        questions: pictures, questions and answers, as `read_questions` gives them.
        batch_size: questions asked at once.
        max_new_tokens: longest answer.
        name: title of the progress bar.
    """
    if not questions:
        raise CalibrationError("there is no question to ask", where="questions", do="give at least one line of data")
    check_questions(processor, questions)
    answers: list[str] = []
    with track(name, len(questions)) as step:
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            answers += answer(generate, processor, batch, max_new_tokens)
            for _ in batch:
                step()
    pairs = zip(answers, questions, strict=True)
    correct = sum(given == question.answer.strip() for given, question in pairs)
    return Score(correct, len(questions), tuple(answers))


def answer(generate: Generate, processor: Any, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
    """The text generated for each question of one batch, stripped."""
    inputs = question_inputs(processor, questions)
    with torch.no_grad():
        tokens = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = new_tokens(inputs, tokens)
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def on_numpy(runner: Any) -> Generate:
    """`generate` of an ONNX runner, which takes and returns arrays, for inputs that are tensors.

    The runner refuses inputs that it does not support.
    """

    def generate(*, max_new_tokens: int, do_sample: bool = False, **inputs: torch.Tensor) -> Any:
        if do_sample:
            raise ValueError("the ONNX runner is greedy: do_sample must be False")
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return runner.generate(**arrays, max_new_tokens=max_new_tokens)

    return generate
