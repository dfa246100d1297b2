"""Ask an exported folder about pictures: text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qpcompile.emit.onnx.runner.chat import Chat, Turn
from qpcompile.emit.onnx.runner.folder import CHAT, RunnerError
from qpcompile.emit.onnx.runner.inputs import IDS
from qpcompile.emit.onnx.runner.pictures import opened
from qpcompile.emit.onnx.runner.runner import OnnxVLM

Array = np.ndarray[Any, Any]


class Runner:
    """An exported folder that answers questions. Whatever fails raises RunnerError.

    In all methods `picture` is a path or a Pillow image, a list of those, or None, and `history` the turns before:
    (picture, question, answer) each. max_new_tokens: None takes the folder's setting. temperature, top_k and top_p ask
    for sampling, which begins at `seed`; temperature 0 asks for the most probable token; without any the folder's
    settings count.
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

    def answer(self, picture: Any, question: str, history: Sequence[tuple[Any, str, str]] = (), **options: Any) -> str:
        """The whole answer. options: those of `stream`."""
        return "".join(self.stream(picture, question, history, **options)).strip()

    def stream(
        self,
        picture: Any,
        question: str,
        history: Sequence[tuple[Any, str, str]] = (),
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Iterator[str]:
        """The answer in parts, as they come."""
        turns = [Turn(_pictures(seen), said, reply) for seen, said, reply in history]
        given = self.chat.inputs([[*turns, Turn(_pictures(picture), question)]])
        choice = _choice(temperature, top_k, top_p)
        steps = self.model.stream(given.pop(IDS), max_new_tokens, seed, choice, **given)
        yield from self.chat.stream(int(step[0]) for step in steps)

    def answers(
        self,
        pictures: Sequence[Any],
        questions: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> list[str]:
        """The answers to several questions, computed together; pictures: `picture` of each question."""
        if len(pictures) != len(questions):
            what = f"{len(pictures)} pictures were given for {len(questions)} questions"
            raise RunnerError(what, "pictures", "give one for each question, or a list, or None")
        given = self.chat.inputs([[Turn(_pictures(p), q)] for p, q in zip(pictures, questions, strict=True)])
        ids = given.pop(IDS)
        made = self.model.generate(ids, max_new_tokens, seed, _choice(temperature, top_k, top_p), **given)
        return [self.chat.text(row).strip() for row in made[:, ids.shape[1] :].tolist()]


def _pictures(given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    return tuple(opened(each) for each in (given if isinstance(given, (list, tuple)) else [given]))


def _choice(temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """Generation settings in place of the folder's."""
    if temperature == 0:
        return {"do_sample": False}
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    asked = {name: value for name, value in asked.items() if value is not None}
    return {"do_sample": True, **asked} if asked else {}
