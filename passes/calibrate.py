"""Run the samples through the full-precision graphs and collect statistics at every activation stub.

All samples go through a layer before any goes through the next (qpcompile/calibration/collect.py). Statistics are per
group of linears that share an input; the prefill graph stands for the decoder, since decoding reads the same weights.
Padding does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qpcompile.calibration.collect import collect
from qpcompile.calibration.statistics import CALIBRATION, Calibration
from qpcompile.ir.program import Program


@dataclass(frozen=True)
class Calibrate:
    """See the module's docstring. `samples` can be iterated more than once; `count` is for the progress bar."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "calibrate"
    needs: ClassVar[str] = "canonical"
    gives: ClassVar[str] = "calibrated"

    def run(self, program: Program) -> bool:
        """Fills `program.measured[CALIBRATION]`; the graphs stay as they are."""
        scheme = program.recipe.quantize
        if scheme is None or scheme.weights.bits == 16 or not self.count:
            program.measured[CALIBRATION] = Calibration()
        else:
            program.measured[CALIBRATION] = collect(program, self.samples, self.count, self.name)
        return False
