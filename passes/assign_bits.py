"""Assign 4 or 8 bits to each site by its measured output error, under a budget of mean bits (`quantize.mean_bits`).

    error of a site = sum over the linears that read one input of  || error of their output ||^2 / || output ||^2

Weights and activations have separate budgets. The error comes from the statistics of calibration: of inputs rounded to
codes, through the full-precision weights; of weights rounded to nearest, through the second moments of their inputs.
Linears that read one input are one site: they share the codes of the input, and `merge_linears` joins products of
weights with the same bits only. A site costs its multiplications for one token, which are its weights: 8 bits are
bought where they save most error per weight. The bits are stored in the facts of stubs; passes after this one clip,
train, solve and pack by them.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from qpcompile.calibration.statistics import CALIBRATION, InputStatistics
from qpcompile.errors import CalibrationError
from qpcompile.ir.edit import calls
from qpcompile.ir.node_facts import set_fact, stub_fact
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.program import Graph, Program
from qpcompile.quantization.basis import weight_name
from qpcompile.quantization.bit_budget import HIGH, LOW, Site, raised
from qpcompile.quantization.rounding_error import relative_input_error, relative_weight_error
from qpcompile.recipe.plan import SiteBits
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

Part = Literal["weights", "activations"]
Measure = Callable[[InputStatistics, Sequence[torch.Tensor], int], float]


@dataclass(frozen=True)
class AssignBits:
    """See the module's docstring. Raises CalibrationError for a site that no sample reached."""

    name: ClassVar[str] = "assign_bits"
    purpose: ClassVar[str] = (
        "Assign 4 or 8 bits to each site by its measured output error, under a budget of mean bits."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `bits` in the facts of stubs, and `plan.bits`; the graphs are unchanged."""
        scheme = program.recipe.quantize
        if scheme is None or program.plan.bits:
            return False
        for part, mean in (("weights", scheme.mean_bits.weights), ("activations", scheme.mean_bits.activations)):
            if mean is not None:
                _assign(program, part, mean, _measures(scheme)[part])
        return False


def _measures(scheme: QuantizeScheme) -> dict[Part, Measure]:
    """The error of a site with a number of bits."""
    return {
        "weights": lambda statistics, weights, bits: relative_weight_error(
            statistics, weights, scheme.weights.model_copy(update={"bits": bits})
        ),
        "activations": lambda statistics, weights, bits: relative_input_error(
            statistics, weights, scheme.activations.model_copy(update={"bits": bits})
        ),
    }


def _assign(program: Program, part: Part, mean: float, measure: Measure) -> None:
    sites = list(_sites(program, measure))
    chosen = raised(sites, mean)
    for graph in program.graphs.values():
        for stub in _inputs(graph):
            fact = stub_fact(stub)
            assert fact is not None
            bits = HIGH if fact.site in chosen else LOW
            marked = [stub] if part == "activations" else [linear.args[1] for linear in stub.users]
            for node in marked:
                assert isinstance(node, fx.Node)
                own = stub_fact(node)
                assert own is not None
                set_fact(node, replace(own, bits=bits))
    found = [
        SiteBits(
            name=site.name,
            part=part,
            bits=HIGH if site.name in chosen else LOW,
            size=site.size,
            error=site.low,
            error_raised=site.high,
        )
        for site in sites
    ]
    program.plan = program.plan.changed(bits=(*program.plan.bits, *found))


def _sites(program: Program, measure: Measure) -> Iterator[Site]:
    """Every input of quantized linears, once, with its errors."""
    on, inputs, seen = Placement.of(program), program.measured[CALIBRATION].inputs, set[str]()
    for graph in program.graphs.values():
        for stub in _inputs(graph):
            fact = stub_fact(stub)
            assert fact is not None
            if fact.site in seen:
                continue
            seen.add(fact.site)
            if fact.site not in inputs or not inputs[fact.site].tokens:
                raise CalibrationError(
                    "the error of this site cannot be measured: no calibration sample reached it",
                    where=fact.site,
                    do="give samples that use it, add it to quantize.ignore, or set quantize.mean_bits to null",
                )
            statistics = inputs[fact.site].to(on.device)
            weights = [on.weight(graph.module, weight_name(linear)).detach() for linear in stub.users]
            low, high = (measure(statistics, weights, bits) for bits in (LOW, HIGH))
            yield Site(fact.site, sum(weight.numel() for weight in weights), low, high)


def _inputs(graph: Graph) -> Iterator[fx.Node]:
    """The stubs of linear inputs."""
    for stub in list(calls(graph, QUANT_STUB)):
        fact = stub_fact(stub)
        if fact is not None and fact.role == "activation":
            yield stub
