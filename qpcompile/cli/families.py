"""The table of model families that ships with the package: what a run of tests/zoo found for each of them.

    families.json   {"versions": {...}, "families": {name: {step: {"result": ..., "reason": ..., "seconds": ...}}}}

Steps are capture, `none` (the answers of `model.generate`), `prune-30`, W4A8 and W4A4 without training, each saved and
loaded, and the exact ONNX export with its runner. Models are tiny and random: the table says what runs, not how well.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qpcompile.errors import InputError

TABLE = Path(__file__).parent / "families.json"
ZOO = Path(__file__).resolve().parents[2] / "tests" / "zoo"
# The columns of the table: step -> heading.
STEPS = {
    "build": "built",
    "capture": "captured",
    "none": "as the model",
    "prune-30": "pruned",
    "w4a8": "W4A8",
    "w4a4": "W4A4",
    "onnx": "ONNX",
}
WORDS = {
    "ok": "yes",
    "refused": "refused",
    "different": "differs",
    "bare": "FAILS",
    "absent": "not built",
    "slow": "too slow",
    "died": "FAILS",
}
Row = Mapping[str, Mapping[str, Any]]


def shipped() -> dict[str, Any]:
    """The shipped table."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def cells(row: Row) -> list[str]:
    """How each step ended, in words; a dash where it was not reached or not run."""
    return [WORDS.get(str(row.get(step, {}).get("result", "")), "-") for step in STEPS]


def reason(row: Row) -> str:
    """Why the first step that did not end well did not, in one line; or what was left on the host."""
    for cell in row.values():
        if cell["result"] != "ok" and cell["reason"]:
            return " ".join(str(cell["reason"]).split())
    return " ".join(str(row.get("capture", {}).get("note", "")).split())


def lines(table: Mapping[str, Any]) -> Iterator[str]:
    """The table as text for a terminal."""
    families: Mapping[str, Row] = table["families"]
    width = max(map(len, families))
    yield " ".join(["family".ljust(width), *(heading.ljust(12) for heading in STEPS.values())]).rstrip()
    for name, row in sorted(families.items()):
        yield " ".join([name.ljust(width), *(cell.ljust(12) for cell in cells(row))]).rstrip()
    yield ""
    yield from totals(families)
    yield ", ".join(f"{name} {version}" for name, version in table["versions"].items())


def totals(families: Mapping[str, Row]) -> Iterator[str]:
    """One line per step: for how many families it ended well, was run, and was not reached after a refusal."""
    built = [row for row in families.values() if row.get("build", {}).get("result") == "ok"]
    yield f"built: {len(built)} of {len(families)}"
    for step, heading in list(STEPS.items())[1:]:
        run = [row for row in built if step in row]
        good = sum(row[step]["result"] == "ok" for row in run)
        before = sum(step not in row and any(cell["result"] != "ok" for cell in row.values()) for row in built)
        yield f"{heading}: {good} of {len(run)} that it was run for; {before} stopped before"


def page(table: Mapping[str, Any]) -> str:
    """docs/families.md."""
    families: Mapping[str, Row] = table["families"]
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    text = [
        "<!-- Written by tests/zoo/run.py from a run: `make test-zoo` makes it again. -->",
        "",
        "# Model families",
        "",
        "Image-text-to-text families that the installed transformers lists, as tiny random models"
        " ([`tests/zoo`](../tests/zoo)). The table says what runs, not how well a trained model answers.",
        "",
        f"Versions: {versions}.",
        "",
        "- *as the model*: the tokens and logits of `model.generate` for one picture, another size, two pictures, a",
        "  left-padded batch and text alone.",
        "- *pruned*: `prune-30`; *W4A8*: `w4a8kv4`; *W4A4*: `w4a4kv4` with a fixed rotation, without training. Each is",
        "  compiled, checked against recomputation, saved, loaded, and answers the same prompts.",
        "- *ONNX*: the exact export of `none`; its runner gives the module's tokens.",
        "- A family that is not in the table has not been run.",
        "- *refused*: an error of ours says why, and what to do. *-*: not reached, or not run.",
        "",
        *(f"- {line}" for line in totals(families)),
        "",
        f"| family | {' | '.join(STEPS.values())} | note |",
        f"| --- |{' --- |' * (len(STEPS) + 1)}",
    ]
    for name, row in sorted(families.items()):
        note = reason(row).replace("|", "/").replace("<", "&lt;")
        text.append(f"| `{name}` | {' | '.join(cells(row))} | {note[:240]} |")
    return "\n".join(text) + "\n"


def run(name: str) -> Iterator[str]:
    """Take one family through every step on this machine; a line for each.

    Raises InputError for a family that transformers does not list, and where the package was installed without tests.
    """
    if not ZOO.is_dir():
        raise InputError(
            "the tiny models of the families are not installed with the package",
            where=str(ZOO),
            do="run it in a checkout of the source, installed with pip install -e .",
        )
    sys.path.insert(0, str(ZOO))
    names: list[str] = importlib.import_module("models").names()
    if name not in names:
        raise InputError(f"transformers lists no family {name}", where="--run", do=f"name one of {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "row.json"
        importlib.import_module("one").main(name, target, list(STEPS))
        for step, cell in json.loads(target.read_text()).items():
            yield f"{STEPS.get(step, step)}: {WORDS[cell['result']]} ({cell['seconds']} s) {cell['reason']}".rstrip()
