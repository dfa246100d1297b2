"""A compiled model and its original, asked the same questions in turns: answers, accuracy, time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from qpcompile.capture.data_folder import Question, check_questions, question_inputs
from qpcompile.capture.right_answers import right_answers
from qpcompile.emit.artifact.weights import stored_tensors, total_bytes
from qpcompile.errors import CalibrationError
from qpcompile.inspect.overlay import ANSWER_TOKENS
from qpcompile.progress import track
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.model_inputs import new_tokens

# Answers that a report shows side by side; all are counted.
SHOWN = 12
# Questions whose answers are timed; one more before them is not.
TIMED = 5


@dataclass(frozen=True)
class Measured:
    """One model over all questions.

    answers: one per question. right: how many of them are right. first_ms: median time to the first token, in
    milliseconds. token_ms: median time per later token. Both are of `timed` answers of ANSWER_TOKENS tokens, whatever
    the model would have answered. weight_bytes: its weights in memory. cache_bytes: the largest KV cache at the end of
    these answers.
    """

    answers: tuple[str, ...]
    right: int
    first_ms: float
    token_ms: float
    weight_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class Row:
    """One question with the answers of both models; `original` is None if only the compiled one was asked."""

    question: str
    right: str
    original: str | None
    compiled: str

    @property
    def differs(self) -> bool:
        """Whether two models answered, and not alike."""
        return self.original is not None and self.original != self.compiled


@dataclass(frozen=True)
class SideBySide:
    """What was measured on `questions`, times on the first `timed` ones; `threads` is torch's number of threads."""

    questions: tuple[Question, ...]
    compiled: Measured
    original: Measured | None
    threads: int

    @property
    def timed(self) -> int:
        """The number of answers that were timed."""
        return min(TIMED, len(self.questions))

    @property
    def equal_answers(self) -> int:
        """Questions that both models answered with the same text."""
        return sum(not row.differs for row in self.rows)

    @property
    def rows(self) -> list[Row]:
        """All questions, those with different answers first."""
        theirs = self.original.answers if self.original else (None,) * len(self.questions)
        asked = zip(self.questions, theirs, self.compiled.answers, strict=True)
        found = [Row(question.question, question.answer, before, after) for question, before, after in asked]
        return sorted(found, key=lambda row: not row.differs)


@dataclass
class _Asked:
    """A model with what it has answered so far, and how long timed answers took."""

    generate: Callable[..., Any]
    cache_bytes: Callable[[Any], int]
    answers: list[str] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    laters: list[float] = field(default_factory=list)
    largest: int = 0

    def ask(self, inputs: dict[str, Any], processor: Any) -> None:
        """One greedy answer, up to its end."""
        new = new_tokens(inputs, self._answer(inputs).sequences)
        self.answers.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())

    def time(self, inputs: dict[str, Any]) -> None:
        """One answer of ANSWER_TOKENS tokens: short ones would be told by their first steps alone."""
        clock = _Clock()
        answer = self._answer(inputs, min_new_tokens=ANSWER_TOKENS, streamer=clock)
        self.largest = max(self.largest, self.cache_bytes(answer))
        self.firsts.append(clock.first_ms)
        self.laters.append(clock.later_ms)

    def measured(self, questions: Sequence[Question], weight_bytes: int) -> Measured:
        """The sum; the first timed answer is left out."""
        return Measured(
            answers=tuple(self.answers),
            right=sum(right_answers(questions, self.answers)),
            first_ms=median(self.firsts[1:]),
            token_ms=median(self.laters[1:]),
            weight_bytes=weight_bytes,
            cache_bytes=self.largest,
        )

    def _answer(self, inputs: dict[str, Any], **settings: Any) -> Any:
        common = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "return_dict_in_generate": True}
        with torch.no_grad():
            return self.generate(**inputs, **common, **settings)


class _Clock:
    """A streamer: notes when tokens come. `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """The prompt, or a new token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The answer is complete."""

    @property
    def first_ms(self) -> float:
        """Milliseconds to the first new token."""
        return 1e3 * (self.times[1] - self.start)

    @property
    def later_ms(self) -> float:
        """Milliseconds per new token after the first."""
        return 1e3 * (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def side_by_side(machine: Machine, original: Any, processor: Any, questions: Sequence[Question]) -> SideBySide:
    """Ask both models every question by itself, in turns.

    Args:
        machine: the compiled model.
        original: the transformers model it was compiled from, on the same device; None measures the compiled one alone.
        processor: the processor of both.
        questions: with right answers, as `read_questions` gives them.

    Raises CalibrationError without a question or a processor, and for a picture that cannot be read.
    """
    if processor is None or not questions:
        raise CalibrationError(
            "questions need a processor, and this model has none" if questions else "there is no question to ask",
            where="report data",
            do="compile with processor=..." if questions else "give a folder with at least one line of data",
        )
    check_questions(processor, questions)
    ours = _Asked(machine.generate, lambda _: 0 if machine.last is None else machine.last.nbytes())
    theirs = None if original is None else _Asked(original.generate, lambda answer: _held(answer.past_key_values))
    models = list(filter(None, (theirs, ours)))
    with track(" and ".join(["original", "compiled model"][-len(models) :]), len(questions)) as step:
        for question in questions:
            inputs = question_inputs(processor, [question])
            for model in models:
                model.ask(inputs, processor)
            step()
    # The first question twice: what is only set up once takes no part in the times.
    for question in (questions[0], *questions[:TIMED]):
        inputs = question_inputs(processor, [question])
        for model in models:
            model.time(inputs)
    after = ours.measured(questions, total_bytes(stored_tensors(machine.program)))
    before = None
    if original is not None and theirs is not None:
        before = theirs.measured(questions, sum(each.nbytes for each in original.parameters()))
    return SideBySide(tuple(questions), after, before, torch.get_num_threads())


def _held(cache: Any) -> int:
    """Bytes of all tensors of a transformers cache."""
    held = (value for layer in cache.layers for value in vars(layer).values())
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))
