"""Answers of one compiled model to many requests: a queue with a limit, and batches of what waits.

One thread generates. It takes the oldest request and those behind it that can be generated with it, as one left-padded
batch; requests that come in the meantime wait for the next one. A row ends by itself: at its end token, its limit, its
stop strings, or when nobody waits for it any more; the batch ends with its last row.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qpcompile.capture.chat import Conversation, chat_inputs
from qpcompile.errors import QPCompileError
from qpcompile.serve.requests import Settings

_LOG = logging.getLogger("qpcompile")
# What an incomplete character decodes to.
_INCOMPLETE = "�"
Reason = Literal["stop", "length"]


class BusyError(Exception):
    """The queue is full, or the server is stopping."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer, in order. The last one has a reason or an error."""

    text: str = ""
    reason: Reason | None = None
    error: Exception | None = None
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def last(self) -> bool:
        """Whether the answer ends with it."""
        return self.reason is not None or self.error is not None


@dataclass
class Job:
    """One request: `give` gets its pieces, in the engine's thread. `cancelled` ends it early."""

    conversation: Conversation
    settings: Settings
    give: Callable[[Piece], None]
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list[int])
    given: int = 0
    done: bool = False


class Engine:
    """See the module's docstring.

    Args:
        model: a compiled model, with `generate`; nobody else may use it meanwhile.
        processor: its processor, with a chat template.
        most_rows: requests that are answered together.
        most_waiting: requests that may wait.
        watch: told the number of rows of each batch.
    """

    def __init__(
        self, model: Any, processor: Any, most_rows: int, most_waiting: int, watch: Callable[[int], None]
    ) -> None:
        self._model, self._processor = model, processor
        self._most_rows, self._most_waiting, self._watch = most_rows, most_waiting, watch
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="qpcompile-serve", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that are not being answered yet."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closing

    def submit(self, job: Job) -> None:
        """Queue a request. Raises BusyError if there is no room."""
        with self._changed:
            if self._closing:
                raise BusyError("the server is stopping")
            if len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{self._most_waiting} requests are waiting already")
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Answer what is queued, then end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self._watch(len(batch))
            self._answer(batch)

    def _next(self) -> list[Job]:
        """The next batch; empty when the engine closes."""
        with self._changed:
            while True:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                if self._waiting:
                    break
                if self._closing:
                    return []
                self._changed.wait()
            first = self._waiting[0]
            fitting = [job for job in self._waiting if job is first or job.settings.mixes_with(first.settings)]
            batch = fitting[: self._most_rows]
            self._waiting = deque(job for job in self._waiting if job not in batch)
            return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        try:
            self._generate(batch)
        except Exception as error:  # noqa: BLE001 one bad request must not end the server
            left = [job for job in batch if not job.done]
            if len(batch) > 1 and isinstance(error, QPCompileError) and not any(job.tokens for job in left):
                # One of them is at fault: alone, each of the others is answered.
                for job in left:
                    self._answer([job])
                return
            if not isinstance(error, QPCompileError):
                _LOG.error("an answer failed: %s: %s", type(error).__name__, error)
            for job in left:
                job.done = True
                job.give(Piece(error=error))

    def _generate(self, batch: Sequence[Job]) -> None:
        places = ["the request"] if len(batch) == 1 else [f"request {number}" for number in range(len(batch))]
        inputs = chat_inputs(self._processor, [job.conversation for job in batch], places)
        device = self._model.device
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        first = batch[0].settings
        if first.seed is not None and first.temperature:
            torch.manual_seed(first.seed)
        sampling = {"temperature": first.temperature, "top_p": first.top_p} if first.temperature else {}
        rows = _Rows(batch, self._model, self._processor, _prompt_tokens(inputs))
        self._model.generate(
            **inputs,
            max_new_tokens=max(job.settings.max_tokens for job in batch),
            do_sample=bool(first.temperature),
            **sampling,
            streamer=rows,
            stopping_criteria=StoppingCriteriaList([_AllDone(batch)]),
        )
        rows.finish()


class _Rows(BaseStreamer):
    """Gives each row of a batch the text of its tokens."""

    def __init__(self, batch: Sequence[Job], model: Any, processor: Any, prompt_tokens: Sequence[int]) -> None:
        self._batch, self._decode, self._prompt_tokens = batch, processor.batch_decode, prompt_tokens
        ends = model.generation_config.eos_token_id
        self._ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each step's tokens, i64[B]."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for row, token in enumerate(value.flatten().tolist()):
            job = self._batch[row]
            if job.cancelled:
                job.done = True
            if job.done:
                continue
            if token in self._ends:
                self._give(row, "stop")
                continue
            job.tokens.append(token)
            self._give(row, "length" if len(job.tokens) == job.settings.max_tokens else None)

    def end(self) -> None:
        """Called after the last step."""

    def finish(self) -> None:
        """End the rows that the loop left open."""
        for row, job in enumerate(self._batch):
            if not job.done:
                self._give(row, "length")

    def _give(self, row: int, reason: Reason | None) -> None:
        """Give a row its new text, up to a stop string; hold back what may become one, and half characters."""
        job = self._batch[row]
        text = self._decode([job.tokens], skip_special_tokens=True)[0]
        found = [place for stop in job.settings.stops if (place := text.find(stop)) >= 0]
        if found:
            text, reason = text[: min(found)], "stop"
        end = len(text) if reason is not None else _safe_length(text, job.settings.stops)
        new, job.given = text[job.given : end], max(job.given, end)
        if reason is not None:
            job.done = True
        if new or reason is not None:
            job.give(Piece(new, reason, None, self._prompt_tokens[row], len(job.tokens)))


class _AllDone(StoppingCriteria):
    """Ends the rows that are done; the loop ends with the last one."""

    def __init__(self, batch: Sequence[Job]) -> None:
        self._batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor([job.done for job in self._batch], device=input_ids.device)


def _safe_length(text: str, stops: Sequence[str]) -> int:
    """The length of the text without an incomplete character, and without an end that a stop string begins with."""
    end = len(text.rstrip(_INCOMPLETE))
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return end


def _prompt_tokens(inputs: dict[str, Any]) -> list[int]:
    """The tokens of each row, without padding."""
    mask = inputs.get("attention_mask")
    rows, length = inputs["input_ids"].shape
    return [length] * rows if mask is None else mask.sum(dim=1).tolist()
