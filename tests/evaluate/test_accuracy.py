"""Accuracy: exact matches are counted, whatever returns the tokens; the runner receives four arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qpcompile.capture.data_folder import Question, question_inputs, read_questions
from qpcompile.errors import CalibrationError
from qpcompile.evaluate.run.accuracy import Score, accuracy, on_numpy

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
END = 3


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(TESTBED / "llava")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return read_questions(TESTBED / "calibration" / "llava")[:5]


class Scripted:
    """A model that returns the given answers, one batch after the other."""

    def __init__(self, processor: Any, answers: Sequence[str]) -> None:
        self.tokenizer = processor.tokenizer
        self.answers = list(answers)
        self.calls: list[dict[str, Any]] = []

    def generate(self, **inputs: Any) -> torch.Tensor:
        self.calls.append(inputs)
        ids = torch.as_tensor(inputs["input_ids"])
        rows = [self.answers.pop(0) for _ in range(len(ids))]
        tokens = [[*self.tokenizer.encode(row, add_special_tokens=False), END] for row in rows]
        longest = max(map(len, tokens))
        padded = [row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in tokens]
        return torch.cat([ids, torch.tensor(padded)], dim=1)


class WithEncoder(Scripted):
    """The same with an encoder: its decoder starts with a token of its own, not with the prompt."""

    def generate(self, **inputs: Any) -> torch.Tensor:
        tokens = super().generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        return torch.cat([torch.full((len(tokens), 1), END), tokens], dim=1)


def test_answers_after_an_encoder_are_whole(processor: Any, questions: list[Question]) -> None:
    """The decoder's first token is left out, and nothing else, also where an answer is longer than the prompt."""
    answers = ["red", "red star " * 40, "", "7", "blue"]
    asked = [Question(q.image, q.question, text, (), q.where) for q, text in zip(questions, answers, strict=True)]
    score = accuracy(WithEncoder(processor, answers).generate, processor, asked, batch_size=2)
    assert score.correct == 5 and list(score.answers) == [text.strip() for text in answers]


def test_right_answers_are_counted(processor: Any, questions: list[Question]) -> None:
    answers = [question.answer for question in questions]
    answers[3] = "circle" if answers[3] != "circle" else "star"
    model = Scripted(processor, answers)
    score = accuracy(model.generate, processor, questions, batch_size=2, max_new_tokens=4)
    assert (score.correct, score.total, score.accuracy) == (4, 5, 0.8)
    assert list(score.answers) == answers
    assert [len(call["input_ids"]) for call in model.calls] == [2, 2, 1]
    assert all(call["max_new_tokens"] == 4 and call["do_sample"] is False for call in model.calls)


def test_prompts_are_padded_in_front(processor: Any, questions: list[Question]) -> None:
    processor.tokenizer.padding_side = "right"
    model = Scripted(processor, [question.answer for question in questions])
    accuracy(model.generate, processor, questions, batch_size=5)
    mask = model.calls[0]["attention_mask"]
    assert mask[:, -1].all() and not mask[:, 0].all()


def test_spaces_at_the_ends_do_not_count(processor: Any, questions: list[Question]) -> None:
    spaced = [Question(question.image, question.question, f" {question.answer}\n") for question in questions]
    model = Scripted(processor, [question.answer for question in questions])
    assert accuracy(model.generate, processor, spaced, 5).correct == 5


def test_runner_takes_and_returns_arrays(processor: Any, questions: list[Question]) -> None:
    model = Scripted(processor, [question.answer for question in questions])
    seen: list[dict[str, Any]] = []

    class Runner:
        def generate(self, max_new_tokens: int, **arrays: Any) -> Any:
            seen.append(arrays)
            return model.generate(**arrays, max_new_tokens=max_new_tokens).numpy()

    score = accuracy(on_numpy(Runner()), processor, questions, 5)
    assert score.correct == 5
    assert set(seen[0]) == {"input_ids", "attention_mask", "pixel_values"}
    assert all(isinstance(array, np.ndarray) for array in seen[0].values())


def test_the_runner_is_given_every_input() -> None:
    seen: dict[str, Any] = {}

    class Runner:
        def generate(self, **arrays: Any) -> None:
            seen.update(arrays)

    one = torch.ones(1, 2)
    on_numpy(Runner())(input_ids=one, mm_token_type_ids=one, image_grid_thw=one, max_new_tokens=1, do_sample=False)
    assert set(seen) == {"input_ids", "mm_token_type_ids", "image_grid_thw", "max_new_tokens"}
    with pytest.raises(ValueError, match="greedy"):
        on_numpy(Runner())(input_ids=one, max_new_tokens=1, do_sample=True)


def test_no_question_is_refused(processor: Any) -> None:
    with pytest.raises(CalibrationError, match="no question to ask"):
        accuracy(lambda **inputs: None, processor, [])


def test_transformers_model_itself(processor: Any, questions: list[Question]) -> None:
    """The same as asking one question at a time."""
    model: Any = AutoModelForImageTextToText.from_pretrained(TESTBED / "llava").eval()
    score = accuracy(model.generate, processor, questions, 5, max_new_tokens=4)
    expected = []
    for question in questions:
        inputs = question_inputs(processor, [question])
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(tokens, skip_special_tokens=True).strip())
    assert score == Score(sum(a == q.answer for a, q in zip(expected, questions, strict=True)), 5, tuple(expected))
