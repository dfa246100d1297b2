"""The cost of tokenizer.json's rules is bounded before a tokenizer is created.

Its regular expressions run in a backtracking library: `(a+)+$` takes 2**n steps on n letters. Here an expression is
scanned once, without running it: nested repeats and backreferences are refused, and so are more than a few consecutive
repeats, whose cost is polynomial in the text's length. The combined growth by replacements is limited, and so is
padding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MOST_PATTERN, MOST_REPEATS, MOST_TIMES = 4000, 3, 1000
MOST_GROWTH, MOST_PADDING = 1000, 2**20
# In order of application; the model and its vocabulary contain no rules.
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_TOKEN = re.compile(
    r"(?P<back>\\(?:[1-9]|[kg][<'{]))"
    r"|(?P<class>\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\\\[\]])*\])"
    r"|(?P<open>\((?:\?(?:<[=!]|P?<\w+>|[=!>:]|[a-zA-Z-]+:|[a-zA-Z-]+(?=\)))?)?)"
    r"|(?P<close>\))|(?P<bar>\|)|(?P<repeat>[*+?]|\{\d*,?\d*\})[?+]?|(?P<plain>\\.|.)",
    re.DOTALL,
)


def tokenizer_problem(data: Any) -> str:
    """What is wrong with a tokenizer, "" for nothing."""
    if not isinstance(data, dict):
        return "it is not a mapping"
    for number in _numbers(data.get("padding")):
        if number > MOST_PADDING:
            return f"it pads to {number} tokens; at most {MOST_PADDING} are read"
    for part in _PARTS:
        growth = 1.0
        for rule in _rules(data.get(part)):
            pattern, content = rule.get("pattern"), rule.get("content")
            expression = pattern.get("Regex") if isinstance(pattern, dict) else None
            if isinstance(expression, str) and (problem := pattern_problem(expression)):
                return f"{part}: the expression {expression[:80]!r} {problem}"
            if isinstance(content, str):
                replaced = pattern.get("String") if isinstance(pattern, dict) else None
                growth *= max(1.0, len(content) / max(1, len(replaced) if isinstance(replaced, str) else 1))
        if growth > MOST_GROWTH:
            return f"{part}: its replacements make a text {growth:.3g} times as long"
    return ""


def pattern_problem(expression: str) -> str:
    """Why the work of a regular expression is not bounded, "" if it is."""
    if len(expression) > MOST_PATTERN:
        return f"has {len(expression)} characters; at most {MOST_PATTERN} are read"
    # For each open group: unbounded repeats in this branch, the most in an earlier one, and whether there is
    # more than one way through it. The same for the group closed last.
    branch, most, ways = [0], [0], [False]
    repeats, has_ways = 0, False
    for token in _TOKEN.finditer(expression):
        kind = str(token.lastgroup)
        if kind == "back":
            return "refers back to what it has found"
        if kind == "repeat":
            times = _times(token["repeat"])
            if times > MOST_REPEATS and has_ways:
                return "repeats what has repeats or choices"
            branch[-1] += int(times > MOST_TIMES) + repeats * (int(min(times, MOST_REPEATS + 1)) - 1)
            ways[-1] = ways[-1] or token["repeat"][0] != "{" or "," in token["repeat"]
        repeats, has_ways = 0, False
        if kind == "open":
            branch, most, ways = [*branch, 0], [*most, 0], [*ways, False]
        elif kind == "bar":
            most[-1], branch[-1], ways[-1] = max(most[-1], branch[-1]), 0, True
        elif kind == "close" and len(branch) > 1:
            repeats, has_ways = max(most.pop(), branch.pop()), ways.pop()
            branch[-1] += repeats
            ways[-1] = ways[-1] or has_ways
        if branch[-1] > MOST_REPEATS:
            return f"has more than {MOST_REPEATS} repeats after one another"
    return ""


def _times(repeat: str) -> float:
    """The maximum number of repetitions."""
    if repeat in ("*", "+"):
        return float("inf")
    if repeat == "?":
        return 1
    low, comma, high = repeat[1:-1].partition(",")
    return float(high) if high else float("inf") if comma else float(low or 1)


def _rules(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a component, in order."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _rules(inner)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
