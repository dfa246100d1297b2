"""SIGKILL at random moments of a compile, and another compile on what it leaves: python tests/reliability/kills.py

killed        the output is absent or complete; the next compile into the same folders produces the bytes of one
              without a kill, and no other file is beside it
interrupted   the same with a second kill, of the resumed compile
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import forks
from tally import Tally, begin, finish


def uninterrupted(work: Path) -> tuple[dict[str, str], float]:
    """The files of an uninterrupted compile, and its seconds."""
    started = time.monotonic()
    code = forks.wait(forks.fork(lambda: forks.compile_into(work / "out", work / "progress"), work / "log"))
    took = time.monotonic() - started
    if code != forks.DONE:
        raise SystemExit((work / "log").read_text())
    return forks.content(work / "out"), took


def killed(work: Path, expected: dict[str, str], moments: Sequence[float]) -> str:
    """Kill a compile at each of these moments, one after the other, then let one finish; returns a tally's column."""
    place, log = work / "place", work / "log"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    out, progress = place / "out", place / "progress"
    for moment in moments:
        child = forks.fork(lambda: forks.compile_into(out, progress), log)
        code = forks.kill_after(child, moment)
        if code not in (None, forks.DONE):
            print(log.read_text())
            return forks.outcome(code)
        if out.exists():
            return "same" if forks.content(out) == expected else "changed"
    if (code := forks.wait(forks.fork(lambda: forks.compile_into(out, progress), log))) != forks.DONE:
        print(log.read_text())
        # The folder was ours all the time: a refusal is wrong too.
        return "bare" if code == forks.REFUSED else forks.outcome(code)
    left = sorted(path.name for path in place.iterdir())
    hidden = [path.name for path in progress.iterdir() if path.name.startswith(".")]
    if forks.content(out) == expected and left == ["out", "progress"] and not hidden:
        return "same"
    print(f"killed after {moments}: {left}, {hidden}")
    return "changed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="compiles that are killed")
    parser.add_argument("--seed", type=int)
    asked = parser.parse_args(arguments)
    chance = begin(asked.seed)
    forks.ready()
    tallies = [Tally("SIGKILL of a compile, then resumed"), Tally("two SIGKILLs, then resumed")]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        expected, took = uninterrupted(work)
        print(f"an uninterrupted compile: {took:.1f} s, {len(expected)} files", flush=True)
        for number in range(asked.count):
            twice = number % 5 == 4
            moments = _moments(chance, took, 1 + twice)
            found = tallies[twice].add(killed(work, expected, moments))
            print(f"{number + 1} of {asked.count}: after {', '.join(f'{each:.2f}' for each in moments)} s: {found}")
    return finish([each for each in tallies if each.count])


def _moments(chance: random.Random, took: float, count: int) -> list[float]:
    return [chance.uniform(0, took) for _ in range(count)]


if __name__ == "__main__":
    raise SystemExit(main())
