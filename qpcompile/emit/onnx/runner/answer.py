"""Ask an exported folder about pictures: text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from qpcompile.emit.onnx.runner.chat import Chat, Turn
from qpcompile.emit.onnx.runner.folder import CHAT, RunnerError
from qpcompile.emit.onnx.runner.inputs import IDS
from qpcompile.emit.onnx.runner.pictures import opened
from qpcompile.emit.onnx.runner.runner import OnnxVLM

Array = np.ndarray[Any, Any]


class Options(TypedDict, total=False):
    """max_new_tokens: None takes the folder's setting. temperature, top_k and top_p ask for sampling, which begins at
    `seed`; temperature 0 asks for the most probable token; without any the folder's settings count.
    """

    max_new_tokens: int | None
    seed: int
    temperature: float | None
    top_k: int | None
    top_p: float | None


class Runner:
    """An exported folder that answers questions. Whatever fails raises RunnerError.

    In all methods `picture` is a path or a Pillow image, a list of those, or None, and `history` the turns before:
    (picture, question, answer) each. `options` are those of `Options`.
    """

    def __init__(self, folder: str | PathLike[str], threads: int | None = None) -> None:
        """threads: how many the CPU kernels may use; all cores when None."""
        self.model = OnnxVLM(Path(folder), threads)
        if not self.model.speaks:
            raise RunnerError(
                f"the folder has no {CHAT}: it takes token ids and gives token ids",
                str(folder),
                "give it a processor's arrays (OnnxVLM.generate); README.md says why",
            )
        self.chat = Chat(self.model.folder, self.model.image_token)

    def answer(
        self, picture: Any, question: str, history: Sequence[tuple[Any, str, str]] = (), **options: Unpack[Options]
    ) -> str:
        """The whole answer, without white space around it."""
        return self.chat.text(list(self._ids(picture, question, history, options))).strip()

    def stream(
        self, picture: Any, question: str, history: Sequence[tuple[Any, str, str]] = (), **options: Unpack[Options]
    ) -> Iterator[str]:
        """The answer in parts, as they come."""
        yield from self.chat.stream(self._ids(picture, question, history, options))

    def answers(self, pictures: Sequence[Any], questions: Sequence[str], **options: Unpack[Options]) -> list[str]:
        """The answers to several questions, computed together; pictures: `picture` of each question."""
        if len(pictures) != len(questions):
            what = f"{len(pictures)} pictures were given for {len(questions)} questions"
            raise RunnerError(what, "pictures", "give one for each question, or a list, or None")
        given = self.chat.inputs([[Turn(as_pictures(p), q)] for p, q in zip(pictures, questions, strict=True)])
        ids = given.pop(IDS)
        made = self.model.generate(ids, *_chosen(**options), **given)[:, ids.shape[1] :].tolist()
        ends = self.model.choice().ends
        # What fills up a row after its end may be a token of text.
        return [self.chat.text(_up_to(row, ends)).strip() for row in made]

    def _ids(
        self, picture: Any, question: str, history: Sequence[tuple[Any, str, str]], options: Options
    ) -> Iterator[int]:
        """The tokens of the answer, as they come."""
        turns = [Turn(as_pictures(seen), said, reply) for seen, said, reply in history]
        given = self.chat.inputs([[*turns, Turn(as_pictures(picture), question)]])
        for step in self.model.stream(given.pop(IDS), *_chosen(**options), **given):
            yield int(step[0])


def _up_to(row: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    """The tokens of a row up to the first that ends it."""
    return row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]


def as_pictures(given: Any) -> tuple[Any, ...]:
    """The pictures of a question: from a path or a Pillow image, a list of those, or None."""
    if given is None:
        return ()
    return tuple(opened(each) for each in (given if isinstance(given, (list, tuple)) else [given]))


def _chosen(
    max_new_tokens: int | None = None,
    seed: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[int | None, int, dict[str, Any]]:
    """Length, seed, and the generation settings in place of the folder's."""
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    asked = {name: value for name, value in asked.items() if value is not None}
    settings = {"do_sample": False} if temperature == 0 else {"do_sample": True, **asked} if asked else {}
    return max_new_tokens, seed, settings
