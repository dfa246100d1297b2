"""Near misses of rewrite patterns: the node, and why it did not match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qpcompile.ir.measurements import Measurement
from qpcompile.ir.program import Program


@dataclass(frozen=True)
class NearMiss:
    """A node that almost matched a rewrite pattern, and the reason why it did not."""

    graph: str
    node: str
    reason: str


NEAR_MISSES: Measurement[tuple[NearMiss, ...]] = Measurement("near misses")


def note_misses(program: Program, missed: Sequence[NearMiss]) -> None:
    """Add to the near misses of earlier passes, each once."""
    known = program.measured.get(NEAR_MISSES) or ()
    program.measured[NEAR_MISSES] = tuple(dict.fromkeys((*known, *missed)))
