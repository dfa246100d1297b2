"""Two compiles into one output or one `--resume` folder: python tests/reliability/two_compiles.py

While one compile works, a second one is refused before it has done anything, in less than a second; the first one's
output is the same as alone. A killed compile does not block the next one.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import forks
from programs import captured
from tally import Tally, begin, finish

import qpcompile

AT_ONCE = 1.0


def second(work: Callable[[], None], log: Path) -> str:
    """Start a compile that must be refused; returns the outcome's column."""
    started = time.monotonic()
    code = forks.wait(forks.fork(work, log))
    if code == forks.DONE:
        return "changed"
    if code != forks.REFUSED or "is writing there at this moment" not in log.read_text():
        print(log.read_text())
        return "bare" if code >= 0 else "crashed"
    return "refused" if time.monotonic() - started < AT_ONCE else "slow"


def beside(work: Path, tallies: dict[str, Tally]) -> None:
    """One compile, and a second one that is refused; then the first ends, or is killed and another takes its place."""
    out, progress, log = work / "out", work / "progress", work / "second"
    first = forks.fork(lambda: forks.compile_into(out, progress), work / "first")
    while not (progress / "key").exists():
        time.sleep(0.01)
    tallies["output"].add(second(lambda: forks.compile_into(out, work / "other"), log))
    tallies["progress"].add(second(lambda: forks.compile_into(work / "other", progress), log))
    tallies["api"].add(second(lambda: _compile(progress), log))
    os.kill(first, signal.SIGKILL)
    forks.wait(first)
    code = forks.wait(forks.fork(lambda: forks.compile_into(out, progress), work / "third"))
    alone = sorted(path.name for path in work.iterdir()) == ["first", "out", "progress", "second", "third"]
    tallies["after"].add("same" if code == forks.DONE and alone else forks.outcome(code) if code else "changed")


def _compile(progress: Path) -> None:
    """`qpcompile.compile` on a model object."""
    model, cases, _ = captured()
    qpcompile.compile(model, forks.recipe(), calibration=[cases["one"]], resume=progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5, help="rounds of three second compiles")
    asked = parser.parse_args(arguments)
    begin(0)
    forks.ready()
    tallies = {
        "output": Tally("a second compile into one output"),
        "progress": Tally("a second compile with one folder of progress"),
        "api": Tally("the same by qpcompile.compile(resume=)"),
        "after": Tally("a compile into the places of a killed one"),
    }
    for _ in range(asked.count):
        with tempfile.TemporaryDirectory() as folder:
            beside(Path(folder), tallies)
    return finish(list(tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())
