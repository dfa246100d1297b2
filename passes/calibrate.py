"""Run the samples through the full-precision graphs and collect statistics at every activation stub.

Samples are streamed: one is in memory at a time. Statistics are per group of linears that share an input; the
prefill graph stands for the decoder, since decoding reads the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.errors import CalibrationError
from qpcompile.ir.facts import stub_fact
from qpcompile.ir.interpret import run_watched
from qpcompile.ir.program import DECODE, HEAD, Graph, Program
from qpcompile.ir.run import Machine, execute_graph
from qpcompile.ir.statistics import ROWS, Calibration, InputStatistics
from qpcompile.progress import track


@dataclass(frozen=True)
class Calibrate:
    """See the module's docstring. `samples` can be iterated more than once; `count` is for the progress bar."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "calibrate"
    needs: ClassVar[str] = "canonical"
    gives: ClassVar[str] = "calibrated"

    def run(self, program: Program) -> bool:
        """Fills `program.facts["calibration"]`, where an earlier compile has not; the graphs stay as they are."""
        if "calibration" in program.facts:
            return False
        scheme = program.recipe.quantize
        found = Calibration()
        if scheme is None or scheme.weights.bits == 16 or not self.count:
            program.facts["calibration"] = found
            return False
        moments = scheme.weights.solver == "gptq"
        keep = -(-ROWS // self.count)

        def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if graph.name in (HEAD, DECODE):
                return execute_graph(graph, feeds)
            return run_watched(graph, feeds, look)

        def look(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
            fact = stub_fact(node)
            if fact is not None and fact.role == "activation":
                if fact.site not in found.inputs:
                    found.inputs[fact.site] = InputStatistics.empty(value.shape[-1], moments)
                found.inputs[fact.site].add(value, keep)
            return value

        machine = Machine(program, execute)
        with track("calibrate", self.count) as step:
            for number, sample in enumerate(self.samples):
                run_sample(machine, sample, number)
                found.samples += 1
                step()
        _check_finite(found)
        # Only now: a run that broke off must not pass for a measurement.
        program.facts["calibration"] = found
        return False


def run_sample(machine: Machine, sample: dict[str, Any], number: int) -> None:
    """One prefill; what transformers complains about becomes a CalibrationError that names the sample."""
    try:
        machine.prefill(sample)
    except (ValueError, IndexError, RuntimeError, TypeError) as error:
        raise CalibrationError(
            f"the model does not take this sample: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=f"calibration sample {number}, keys {sorted(sample)}",
            do="build samples with this model's own processor, one picture for each picture in the text",
        ) from error


def _check_finite(found: Calibration) -> None:
    for site, statistics in found.inputs.items():
        if not torch.isfinite(statistics.largest).all():
            raise CalibrationError(
                "calibration produced numbers that are not finite",
                where=site,
                do="check the samples and the model's weights for NaN and infinity",
            )
