"""Recipes with every kind of damage, through `Recipe.load`: each is read, or refused in full, in bounded time.

    python tests/reliability/mutate_recipes.py [--count 10000] [--seed 0]

Prints a table by kind of damage. Exit code 1 if an error is not a QPCompileError, lacks a part or is longer than a
screen, if a load takes over 5 s of CPU time, or if a recipe that was read does not round-trip through its own text.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from qpcompile.errors import RecipeError
from qpcompile.recipe.recipe import Recipe, preset_names

LONGEST_SECONDS = 5.0
LONGEST_MESSAGE = 2500
TOKENS = [
    "{", "}", "[", "]", ":", ": ", ",", "- ", "? ", "|", ">", "&a ", "*a", "!!int ", "!x ", "<<: ", "#", "%YAML 1.1\n",
    "---\n", "...\n", "'", '"', "\\", "\t", "\n", "  ", "\0", "\x85", "\ufeff", "~", "null", "yes", "0b_", "1:2:3",
    "2020-01-01", ".nan", "-.inf", "1e999", "0x", "=", "@", "`", "é", "\U0001f600", "\u202e",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, 10**30, 10**39, -(10**39), 0.0, -0.0, 0.5, 1.0, 1.5, 1e-300,
    1e300, 1e308, float("inf"), float("-inf"), float("nan"), "", "auto", "none", "quota", "joint", "0.5", "re:(",
    "re:.*", "re:" + "(a+)+" * 40, "x" * 999, "\0", "é" * 50, [], [0], [0, 1], [1, 0], [10, 90], [[]], [None], {},
    {"a": 1}, {"bits": 4}, [0.1, 0.9], [1.0, 99.0], list(range(5000)), ["vision"], ["vision"] * 3,
]  # fmt: skip


@dataclass
class Result:
    """The outcomes of one kind of damage."""

    loaded: int = 0
    refused: int = 0
    slowest: float = 0.0
    longest: int = 0
    wrong: list[str] = field(default_factory=list)


def bytes_changed(chance: random.Random, text: str) -> bytes:
    """Single bytes replaced, removed and inserted."""
    data = bytearray(text.encode())
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(data))
        data[place : place + chance.randint(0, 2)] = bytes(chance.randrange(256) for _ in range(chance.randint(0, 2)))
    return bytes(data)


def cut(chance: random.Random, text: str) -> bytes:
    """The end is missing, or a piece from the middle."""
    start = chance.randrange(len(text))
    end = chance.choice([len(text), chance.randrange(start, len(text))])
    return (text[:start] + text[end:]).encode()


def tokens_put_in(chance: random.Random, text: str) -> bytes:
    """YAML's own signs and odd scalars at random places."""
    for _ in range(chance.randint(1, 5)):
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice(TOKENS) * chance.choice([1, 1, 1, 2, 40]) + text[place:]
    return text.encode("utf-8", "surrogatepass")


def lines_changed(chance: random.Random, text: str) -> bytes:
    """Lines repeated, swapped, moved to other levels."""
    lines = text.splitlines()
    for _ in range(chance.randint(1, 5)):
        one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        lines[one] = chance.choice([lines[other], "  " + lines[one], lines[one].lstrip(), lines[one] + lines[other]])
    return "\n".join(lines).encode()


def repeated(chance: random.Random, text: str) -> bytes:
    """One piece repeated very often: depth, digits, keys, size."""
    piece = chance.choice(["[", "{a: ", "a: &a [*a]\n", "9", "x", "- ", "? ", " ", "\n", "#", "é", text[:40], "k: v\n"])
    place = chance.randrange(len(text))
    return (text[:place] + piece * chance.choice([10, 100, 1000, 20_000]) + text[place:]).encode()


def bombs(chance: random.Random, text: str) -> bytes:
    """Aliases or merge keys that multiply."""
    inside = chance.choice(["[{}]", "{{<<: [{}]}}", "{{a: [{}]}}"])
    lines = ["l0: &l0 {x: 1}"]
    for level in range(1, chance.randint(2, 30)):
        lines.append(f"l{level}: &l{level} " + inside.format(", ".join([f"*l{level - 1}"] * chance.randint(1, 12))))
    return ("\n".join(lines) + "\n" + text).encode()


def values_changed(chance: random.Random, text: str) -> bytes:
    """Values and keys of the recipe replaced by others: valid YAML, mostly not a valid recipe."""
    data = Recipe.from_yaml(text).to_dict()
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        inner = data
        while True:
            key = chance.choice(list(inner))
            if not isinstance(inner[key], dict) or not inner[key] or chance.random() < 0.1:
                break
            inner = inner[key]
        kind = chance.random()
        if kind < 0.8:
            inner[key] = chance.choice(VALUES)
        elif kind < 0.9:
            inner[chance.choice([key[:-1], key + "s", "", "k" * 900, "a.b", "\n"])] = inner.pop(key)
        else:
            del inner[key]
        if not data:
            break
    return as_yaml(data).encode("utf-8", "surrogatepass")


def as_yaml(value: Any) -> str:
    """Flow style on one line, with YAML's words for what JSON lacks."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")


KINDS: dict[str, Callable[[random.Random, str], bytes]] = {
    "bytes": bytes_changed,
    "cut": cut,
    "tokens": tokens_put_in,
    "lines": lines_changed,
    "repeated": repeated,
    "bombs": bombs,
    "values": values_changed,
}
WEIGHTS = {"bytes": 2, "cut": 1, "tokens": 2, "lines": 2, "repeated": 1, "bombs": 1, "values": 4}


def examine(path: Path, result: Result) -> None:
    """Load one file and record what happened."""
    started = time.process_time()
    try:
        recipe = Recipe.load(path)
    except RecipeError as error:
        result.refused += 1
        result.longest = max(result.longest, len(str(error)))
        if not (error.what and error.where and error.do):
            result.wrong.append(f"incomplete: {error}")
        if len(str(error)) > LONGEST_MESSAGE:
            result.wrong.append(f"{len(str(error))} characters: {str(error)[:200]}")
    except Exception as error:  # noqa: BLE001 - what this script looks for
        result.wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    else:
        result.loaded += 1
        if Recipe.from_yaml(recipe.to_yaml()) != recipe:
            result.wrong.append(f"does not come back: {recipe}")
    seconds = time.process_time() - started
    result.slowest = max(result.slowest, seconds)
    if seconds > LONGEST_SECONDS:
        result.wrong.append(f"{seconds:.1f} s")


def mutate(count: int, seed: int, folder: Path) -> dict[str, Result]:
    """`count` mutated recipes; every number is a seed, so that each can be reproduced."""
    texts = [recipe.to_yaml() for recipe in map(Recipe.load, preset_names())]
    texts += [
        (resources.files("qpcompile.recipe") / "presets" / f"{name}.yaml").read_text("utf-8") for name in preset_names()
    ]
    results = {kind: Result() for kind in KINDS}
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        kind = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        path = folder / "recipe.yaml"
        path.write_bytes(KINDS[kind](chance, chance.choice(texts)))
        before = len(results[kind].wrong)
        examine(path, results[kind])
        results[kind].wrong[before:] = [f"number {number}: {text}" for text in results[kind].wrong[before:]]
    return results


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = mutate(options.count, options.seed, Path(folder))
    print(f"{options.count} mutated recipes, seed {options.seed}, {time.monotonic() - started:.0f} s\n")
    print("| damage | loaded | refused | wrong | slowest | longest message |\n| --- | --- | --- | --- | --- | --- |")
    totals: Counter[str] = Counter()
    for kind, found in results.items():
        totals.update(loaded=found.loaded, refused=found.refused, wrong=len(found.wrong))
        numbers = f"{found.loaded} | {found.refused} | {len(found.wrong)}"
        print(f"| {kind} | {numbers} | {found.slowest:.2f} s | {found.longest} |")
    slowest, longest = max(r.slowest for r in results.values()), max(r.longest for r in results.values())
    print(f"| all | {totals['loaded']} | {totals['refused']} | {totals['wrong']} | {slowest:.2f} s | {longest} |")
    for found in results.values():
        for text in found.wrong[:10]:
            print(text, file=sys.stderr)
    return 1 if totals["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
