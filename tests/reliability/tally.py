"""The counts of a reliability script, as rows of one Markdown table."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

HEADS = ("what", "count", "refused", "same", "changed", "bare", "crashed", "slow")


@dataclass
class Tally:
    """Outcomes of one kind of fault. Good ones: refused by name, same as without it. All others are failures.

    changed: finished with another result, or left files. bare: an exception other than a QPCompileError. crashed:
    ended by a signal. slow: took too long.
    """

    what: str
    refused: int = 0
    same: int = 0
    changed: int = 0
    bare: int = 0
    crashed: int = 0
    slow: int = 0

    @property
    def count(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self)[1:])

    @property
    def failures(self) -> int:
        return self.changed + self.bare + self.crashed + self.slow

    def add(self, outcome: str) -> str:
        """Count an outcome, the name of a column."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        return outcome


def begin(seed: int | None) -> random.Random:
    """A generator for this seed, or for a random one; the seed is the first line of the output."""
    seed = random.randrange(2**31) if seed is None else seed
    print(f"seed {seed}\n", flush=True)
    return random.Random(seed)


def finish(tallies: list[Tally]) -> int:
    """Print the table; returns the exit code, 1 if something failed."""
    rows = [HEADS, ("---",) * len(HEADS), *(tuple(str(getattr(each, head)) for head in HEADS) for each in tallies)]
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)
    return int(any(each.failures for each in tallies))
