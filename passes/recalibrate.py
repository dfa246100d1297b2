"""Recollect the statistics after the token cuts, on the tokens that each layer still has.

GPTQ then minimises the error on kept tokens: dropped tokens, and dead slots of a batch, do not count. The stubs are
placed after the change of basis by now, so statistics need no transformation. Off unless `calibration.after_cuts` is
set and something is cut.

Source: ours; for layers after a cut, second moments of retained tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qpcompile.calibration.collect import collect
from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.ir.program import Program
from qpcompile.quantization.solve import needs_moments
from qpcompile.stages import Stage


@dataclass(frozen=True)
class Recalibrate:
    """See the module's docstring."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "recalibrate"
    purpose: ClassVar[str] = "Recollect the statistics after the token cuts, on the tokens that each layer still has."
    needs: ClassVar[Stage] = "cut"
    gives: ClassVar[Stage] = "cut"

    def run(self, program: Program) -> bool:
        """Replaces `program.measured[CALIBRATION]`; the graphs are unchanged."""
        scheme = program.recipe.quantize
        if scheme is None or scheme.weights.bits == 16 or not self.count or not program.plan.cuts:
            return False
        if program.recipe.recalibrates:
            ratios = program.measured[CALIBRATION].ratios
            moments = needs_moments(scheme.weights)
            program.measured[CALIBRATION] = collect(program, self.samples, self.count, self.name, moments)
            program.measured[CALIBRATION].ratios = ratios
        return False
