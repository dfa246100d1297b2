"""Collect the statistics once more behind the token cuts, on the tokens that each layer still has.

What GPTQ minimises is then the error on kept tokens: dropped ones, and dead slots of a batch, do not count. The stubs
stand behind the change of basis by now, so nothing has to be carried over. Off where `calibration.after_cuts` is not
asked for, or nothing is cut.

Source: for layers behind a cut, second moments of retained tokens; ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qpcompile.calibration.collect import collect
from qpcompile.calibration.statistics import CALIBRATION
from qpcompile.ir.program import Program


@dataclass(frozen=True)
class Recalibrate:
    """See the module's docstring."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "recalibrate"
    needs: ClassVar[str] = "cut"
    gives: ClassVar[str] = "cut"

    def run(self, program: Program) -> bool:
        """Replaces `program.measured[CALIBRATION]`; the graphs stay as they are."""
        scheme = program.recipe.quantize
        if scheme is None or scheme.weights.bits == 16 or not self.count or not program.plan.cuts:
            return False
        if program.recipe.recalibrates:
            ratios = program.measured[CALIBRATION].ratios
            program.measured[CALIBRATION] = collect(program, self.samples, self.count, self.name)
            program.measured[CALIBRATION].ratios = ratios
        return False
