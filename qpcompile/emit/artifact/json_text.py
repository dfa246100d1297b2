"""Strict JSON parser for untrusted input: size limits before parsing, no duplicate keys.

Python's reader accepts duplicate keys, NaN, numbers of any length and any number of entries; artifacts contain none.
"""

from __future__ import annotations

import json
from typing import Any

MOST_BYTES = 64 * 2**20
MOST_ENTRIES = 4_000_000
MOST_DEPTH = 48
MOST_DIGITS = 64


def parse(text: str | bytes, most_bytes: int = MOST_BYTES) -> Any:
    """Parse JSON text. Raises ValueError for invalid text, and for text beyond the size and depth limits."""
    if len(text) > most_bytes:
        raise ValueError(f"it is too large: {len(text)} characters, {most_bytes} are read")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if text.count("[") + text.count("{") + text.count(",") > MOST_ENTRIES:
        raise ValueError(f"it has more than {MOST_ENTRIES} entries")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    _refuse_depth(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"the number {digits[:20]}... has too many digits")
    return int(digits)


def _float(digits: str) -> float:
    found = float(digits) if len(digits) <= MOST_DIGITS else float("inf")
    if found in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:20]} is too large")
    return found


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number in JSON")


def _refuse_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
