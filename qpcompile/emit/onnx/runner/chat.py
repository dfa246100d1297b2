"""From questions about pictures to token ids, and from token ids to text, with the tokenizers package.

A chat template is a program; a folder holds what it writes, in pieces (`chat.json`), and no program:

    first.open  first.image x pictures  first.text  QUESTION                the first question
    answer  ANSWER  later.open  later.image x pictures  later.text  QUESTION        each question after an answer
    end                                                                              where the model goes on

`image` holds the placeholder of a picture once; it stands for all of the picture's visual tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from qpcompile.emit.onnx.runner.choice import whole
from qpcompile.emit.onnx.runner.folder import CHAT, NEW_FOLDER, PICTURES, TOKENIZER, RunnerError, read_json
from qpcompile.emit.onnx.runner.inputs import IDS, MASK
from qpcompile.emit.onnx.runner.pictures import MOST_TOKENS, Pictures
from qpcompile.emit.onnx.runner.tokenizer_rules import tokenizer_problem

Array = np.ndarray[Any, Any]

# Characters of a piece and of a user's text; turns of a chat; pictures of a prompt; bytes of a tokenizer.
MOST_PIECE, MOST_ASKED, MOST_TURNS, MOST_PICTURES, MOST_TOKENIZER = 2**16, 2**18, 2**10, 2**8, 2**27


@dataclass(frozen=True)
class Turn:
    """A question about RGB pictures, or about none, and its answer; the last one of a chat has none yet."""

    pictures: tuple[Image.Image, ...]
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Ask:
    """The pieces of one question: before its pictures, for each of them, before its text."""

    open: str
    image: str
    text: str


@dataclass(frozen=True)
class Pieces:
    """The settings of `chat.json`.

    placeholder: the text that stands for a picture; its token is config.json's image_token_id. special: whether the
    tokenizer adds its special tokens around the text. strip: whether white space around questions and answers goes.
    pad: the token that fills up shorter prompts. control: tokens that no user may name; reserved: texts, likewise.
    """

    placeholder: str
    first: Ask
    later: Ask
    answer: str
    end: str
    special: bool
    strip: bool
    pad: int
    control: tuple[int, ...]
    reserved: tuple[str, ...]

    @classmethod
    def read(cls, settings: Mapping[str, Any], where: str) -> Pieces:
        """The settings; RunnerError for an unknown one, a missing one, or a value of another kind."""
        known = {field.name for field in fields(cls)}
        if different := set(settings) ^ known:
            raise RunnerError(f"unknown or missing: {', '.join(sorted(different))}"[:200], where, NEW_FOLDER)
        read = _Texts(settings, where)
        pieces = cls(
            placeholder=read.text("placeholder"),
            first=read.ask("first"),
            later=read.ask("later"),
            answer=read.text("answer"),
            end=read.text("end"),
            special=read.flag("special"),
            strip=read.flag("strip"),
            pad=whole(settings["pad"], "pad", 0, 2**31, where),
            control=tuple(whole(each, "control", 0, 2**31, where) for each in read.listed("control")),
            reserved=tuple(map(read.checked, read.listed("reserved"))),
        )
        holders = [ask.image.count(pieces.placeholder) for ask in (pieces.first, pieces.later)]
        if not pieces.placeholder or holders != [1, 1]:
            raise RunnerError("a picture has no single placeholder", where, NEW_FOLDER)
        return pieces

    def prompt(self, turns: Sequence[Turn], tokens: Sequence[int] | None = None) -> str:
        """The text of a chat; tokens: the visual tokens of each picture, None for the placeholders alone."""
        counts = iter(tokens or ())
        parts: list[str] = []
        for number, turn in enumerate(turns):
            ask = self.later if number else self.first
            parts.append(ask.open)
            for _ in turn.pictures:
                repeated = self.placeholder * (1 if tokens is None else next(counts))
                parts.append(ask.image.replace(self.placeholder, repeated))
            parts += [ask.text, self._plain(turn.question)]
            if number + 1 < len(turns):
                parts += [self.answer, self._plain(turn.answer or "")]
        return "".join([*parts, self.end])

    def _plain(self, text: str) -> str:
        return text.strip() if self.strip else text


class Chat:
    """Tokenizer, pieces and picture settings of a folder."""

    def __init__(self, folder: Path, image_token: int) -> None:
        """image_token: the id that stands for a picture. Raises RunnerError for settings that no export writes."""
        self.pictures = Pictures.read(read_json(folder / PICTURES), str(folder / PICTURES))
        self.pieces = Pieces.read(read_json(folder / CHAT), str(folder / CHAT))
        where = str(folder / TOKENIZER)
        rules = read_json(folder / TOKENIZER, MOST_TOKENIZER)
        if problem := tokenizer_problem(rules):
            raise RunnerError(f"the tokenizer cannot be used: {problem}", where, NEW_FOLDER)
        # What was checked is what is loaded: the file itself may give a key twice.
        self.tokenizer: Any = _guarded(lambda: Tokenizer.from_str(json.dumps(rules)), "the tokenizer", where)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        if self._ids(self.pieces.placeholder, False) != [image_token]:
            raise RunnerError(f"{self.pieces.placeholder[:100]!r} is not the token {image_token}", where, NEW_FOLDER)

    def inputs(self, chats: Sequence[Sequence[Turn]]) -> dict[str, Array]:
        """input_ids i64[B, S], attention_mask i64[B, S], and pixel_values and image_grid_thw where there are pictures.

        Rows are filled up on the left, so that every answer begins where its prompt ends.
        """
        whole(len(chats), "the number of prompts", 1, 2**12, IDS)
        for turns in chats:
            whole(len(turns), "the number of turns", 1, MOST_TURNS, "history")
            self._refuse_control(turns)
        pictures = [picture for turns in chats for turn in turns for picture in turn.pictures]
        whole(len(pictures), "the number of pictures", 0, MOST_PICTURES, "picture")
        arrays, counts = self.pictures.inputs(pictures)
        whole(sum(counts), "the number of visual tokens", 0, MOST_TOKENS, "picture")
        left = iter(counts)
        rows: list[list[int]] = []
        for turns in chats:
            tokens = [next(left) for turn in turns for _ in turn.pictures]
            rows.append(self._ids(self.pieces.prompt(turns, tokens), self.pieces.special))
        width = max(map(len, rows))
        ids = np.array([[self.pieces.pad] * (width - len(row)) + row for row in rows], np.int64)
        mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int64)
        return {IDS: ids, MASK: mask, **arrays}

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        return _guarded(lambda: self.tokenizer.decode(list(ids), skip_special_tokens=True), "the answer", TOKENIZER)

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """The text of an answer as it comes: only whole characters, which may take several tokens each.

        A token's text depends on those before it (spaces, parts of characters), so it is what the last tokens together
        say more than they said without it.
        """
        seen: list[int] = []
        start = told = 0
        for token in ids:
            seen.append(token)
            before, now = self.text(seen[start:told]), self.text(seen[start:])
            if now.startswith(before) and now != before and not now.endswith("\ufffd"):
                yield now[len(before) :]
                start, told = told, len(seen)
        before, now = self.text(seen[start:told]), self.text(seen[start:])
        if now.startswith(before) and now != before:
            yield now[len(before) :]

    def _ids(self, text: str, special: bool) -> list[int]:
        made = _guarded(lambda: self.tokenizer.encode(text, add_special_tokens=special), "the prompt", TOKENIZER)
        return list(made.ids)

    def _refuse_control(self, turns: Sequence[Turn]) -> None:
        """Text that would be read as tokens of the model, and text without end."""
        control = set(self.pieces.control)
        answers = [turn.answer for turn in turns[:-1]]
        for text in (*(turn.question for turn in turns), *answers):
            if not isinstance(text, str) or len(text) > MOST_ASKED:
                raise RunnerError(
                    "a question or an answer is not text, or too long", "question", f"give {MOST_ASKED} characters"
                )
            inside = [name for name in self.pieces.reserved if name in text]
            inside += [str(self.tokenizer.id_to_token(each)) for each in self._ids(text, False) if each in control]
            if inside:
                what = f"the text holds {inside[0]!r}, which is a token of the model and not text: {text[:200]!r}"
                raise RunnerError(what, "question", "write it in another way: with spaces in it, or in words")


@dataclass(frozen=True)
class _Texts:
    """Reads settings of `chat.json`; what is not of the kind asked for is a RunnerError."""

    settings: Mapping[str, Any]
    where: str

    def checked(self, value: Any) -> str:
        """A short text."""
        if not isinstance(value, str) or len(value) > MOST_PIECE:
            raise RunnerError(f"{str(value)[:100]!r} is no text of a chat", self.where, NEW_FOLDER)
        return value

    def text(self, name: str) -> str:
        """A text by name."""
        return self.checked(self.settings[name])

    def flag(self, name: str) -> bool:
        """True or false."""
        if not isinstance(self.settings[name], bool):
            raise RunnerError(f"{name} is {self.settings[name]!r}"[:200], self.where, "give true or false")
        return self.settings[name]

    def listed(self, name: str) -> list[Any]:
        """A short list."""
        value = self.settings[name]
        if not isinstance(value, list) or len(value) > 2**14:
            raise RunnerError(f"{name} is not a list", self.where, NEW_FOLDER)
        return value

    def ask(self, name: str) -> Ask:
        """The pieces of a question."""
        value = self.settings[name]
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(Ask)}:
            raise RunnerError(f"{name} is not open, image and text", self.where, NEW_FOLDER)
        return Ask(**{key: self.checked(text) for key, text in value.items()})


def _guarded(work: Any, what: str, where: str) -> Any:
    """The tokenizer's own errors and panics, which are no Exceptions, as RunnerError."""
    try:
        return work()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:200]
        raise RunnerError(f"{what} cannot be read: {type(error).__name__}: {said}", where, NEW_FOLDER) from error
