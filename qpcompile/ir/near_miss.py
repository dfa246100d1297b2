"""Near misses of rewrite patterns: the node, and why it did not match."""

from __future__ import annotations

from dataclasses import dataclass

from qpcompile.ir.measurements import Measurement


@dataclass(frozen=True)
class NearMiss:
    """A node that almost matched a rewrite pattern, and the reason why it did not."""

    graph: str
    node: str
    reason: str


NEAR_MISSES: Measurement[tuple[NearMiss, ...]] = Measurement("near misses")
