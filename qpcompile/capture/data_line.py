"""One line of `data.jsonl`, checked key by key as it is read.

    {"image": "00000.png", "question": "what color is the star?", "answer": "red", "choices": ["red", "blue"]}

"groups" names the groups that a question counts in: subjects, grades. Numbers as answers, choices or groups keep the
text in the file: 0 is "0", 1.50 is "1.50". Other keys are foreign columns and
are ignored; a common alias of a missing key is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

# A line contains names and text, not pictures: a longer line is invalid.
MOST_LINE_BYTES = 1 << 20
# Common aliases of our keys in exports.
_MEANT = {
    "images": "image",
    "image_path": "image",
    "questions": "question",
    "answers": "answer",
    "choice": "choices",
    "options": "choices",
    "option": "choices",
    "group": "groups",
}
KEYS = ("image", "question", "answer", "choices", "groups")


class LineError(ValueError):
    """What is wrong with a line, and what to do about it."""

    def __init__(self, problem: str, do: str) -> None:
        super().__init__(problem)
        self.do = do


@dataclass(frozen=True)
class Line:
    """The validated fields of a line."""

    image: str
    question: str
    answer: str
    choices: tuple[str, ...]
    groups: tuple[str, ...]


class _Number(str):
    """The literal text of a number in the line."""


def parse_line(raw: bytes) -> Line:
    """The fields of one line (UTF-8, without its line end). Raises LineError for invalid lines."""
    entry = _object(raw)
    for key in entry:
        plain = key.strip().casefold()
        meant = _MEANT.get(plain, plain)
        if meant in KEYS and meant not in entry:
            raise LineError(f"the key {key!r} is unknown", f"write {meant!r}, if that is what is meant")
    image = _text(entry, "image")
    question = _text(entry, "question")
    answer = _text(entry, "answer", numbers=True).strip()
    return Line(image, question, answer, _choices(entry, answer), _texts(entry, "groups"))


def _object(raw: bytes) -> dict[str, Any]:
    if len(raw) > MOST_LINE_BYTES:
        raise LineError(f"it is longer than {MOST_LINE_BYTES:,} bytes", "give pictures as files, not as text")
    try:
        text = raw.decode("utf-8")
        entry = json.loads(
            text, parse_int=_Number, parse_float=_Number, parse_constant=_no_number, object_pairs_hook=_pairs
        )
    except UnicodeDecodeError as error:
        raise LineError(f"it is not UTF-8: {error}", "save the file as UTF-8") from error
    except LineError:
        raise
    except (ValueError, RecursionError) as error:
        raise LineError(f"it is not JSON: {error}", "write one JSON object per line") from error
    if not isinstance(entry, dict):
        raise LineError(f"it is {_kind(entry)}, not an object", 'write {"image": ..., "question": ..., ...}')
    return entry


def _no_number(name: str) -> Any:
    raise LineError(f"{name} is not JSON", "write null, or leave the key out")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise LineError(f"the key {twice[:80]!r} is there twice", "leave one of them")
    return entry


def _text(entry: dict[str, Any], key: str, *, numbers: bool = False) -> str:
    if key not in entry:
        raise LineError(f"the key {key!r} is missing", "give image, question and answer")
    return _as_text(entry[key], key, numbers)


def _as_text(value: Any, name: str, numbers: bool) -> str:
    allowed = "a text or a number" if numbers else "a text"
    if not isinstance(value, str) or (isinstance(value, _Number) and not numbers):
        raise LineError(f"{name} is {_kind(value)}, not {allowed}", f"write {allowed}, one for each line")
    if not value.strip():
        raise LineError(f"{name} is empty", f"write {allowed}, or take the line out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LineError(f"{name} holds half of a surrogate pair", "write the whole character") from error
    return str(value)


def _choices(entry: dict[str, Any], answer: str) -> tuple[str, ...]:
    """The choices of a line, without surrounding spaces; none where the key is missing or null."""
    found = _texts(entry, "choices")
    if entry.get("choices") is not None and len(found) < 2:
        raise LineError(f"choices has {len(found)} entries", "give at least two, or leave choices out")
    if found and answer not in found:
        raise LineError(f"the answer {answer[:80]!r} is none of the choices", "write the answer as one of the choices")
    return found


def _texts(entry: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of different texts or numbers, without surrounding spaces; none where the key is missing or null."""
    given = entry.get(key)
    if given is None:
        return ()
    if not isinstance(given, list):
        raise LineError(f"{key} is {_kind(given)}, not a list", 'write a list: ["red", "blue"]')
    found = tuple(_as_text(text, f"{key}[{index}]", True).strip() for index, text in enumerate(given))
    if len(set(found)) < len(found):
        twice = next(text for text in found if found.count(text) > 1)
        raise LineError(f"{key} holds {twice[:80]!r} twice", "give each one once")
    return found


def _kind(value: Any) -> str:
    """The kind of a JSON value, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {_Number: "a number", str: "a text", list: "a list", dict: "an object"}
    return kinds[type(value)]
