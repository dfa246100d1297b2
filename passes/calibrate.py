"""Run the samples through the full-precision graphs and collect statistics at every activation stub.

Calibration is layer by layer: all samples run through a layer before any runs through the next
(qpcompile/calibration/collect.py). Statistics are kept per group of linears that share an input. The prefill graph
represents the decoder, since decode reads the same weights. Padding tokens are excluded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qpcompile.calibration.collect import collect
from qpcompile.calibration.statistics import CALIBRATION, Calibration
from qpcompile.ir.program import Program
from qpcompile.quantization.solve import uses_moments
from qpcompile.stages import Stage


@dataclass(frozen=True)
class Calibrate:
    """See the module's docstring. `samples` can be iterated repeatedly; `count` is for the progress bar."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "calibrate"
    purpose: ClassVar[str] = (
        "Run the samples through the full-precision graphs and collect statistics at every activation stub."
    )
    needs: ClassVar[Stage] = "canonical"
    gives: ClassVar[Stage] = "calibrated"

    def run(self, program: Program) -> bool:
        """Fills `program.measured[CALIBRATION]`; the graphs are unchanged."""
        scheme = program.recipe.quantize
        if scheme is None or scheme.weights.bits == 16 or not self.count:
            program.measured[CALIBRATION] = Calibration()
        else:
            moments = uses_moments(scheme)
            program.measured[CALIBRATION] = collect(program, self.samples, self.count, self.name, moments)
        return False
