"""Places that a rewrite almost matched: which node, and what kept it apart."""

from __future__ import annotations

from dataclasses import dataclass

from qpcompile.ir.measurements import Measurement


@dataclass(frozen=True)
class NearMiss:
    """A node that a rewrite left alone although it looks like one that is rewritten, and the reason."""

    graph: str
    node: str
    reason: str


NEAR_MISSES: Measurement[tuple[NearMiss, ...]] = Measurement("near misses")
