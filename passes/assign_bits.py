"""Assign 4 or 8 bits to each site by what its rounding costs, under a budget of mean bits (`quantize.mean_bits`).

    cost of a site = sum over the linears that read one input of  sensitivity * || error of their output ||^2

in nats of the answer's first token (quantization/loss_sensitivity.py). The error comes from the statistics of
calibration: of inputs rounded to codes, through the full-precision weights; of weights rounded to nearest, through the
second moments of their inputs. Weights and activations have separate budgets. Linears that read one input are one site:
they share the codes of the input, and `merge_linears` joins products of weights with the same bits only. A site counts
as its multiplications for one token, which are its weights: 8 bits are bought where they save most nats per weight. The
bits are stored in the facts of stubs; passes after this one clip, train, solve and pack by them.

Source: ours; the cost is HAWQ-V2's (arXiv 1911.03852, section 3) with the Fisher matrix and measured rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import fx

from qpcompile.calibration.statistics import CALIBRATION, InputStatistics
from qpcompile.errors import CalibrationError
from qpcompile.ir.edit import calls
from qpcompile.ir.node_facts import set_fact, stub_fact
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.program import Graph, Program
from qpcompile.quantization.basis import weight_name
from qpcompile.quantization.bit_budget import HIGH, LOW, Site, raised
from qpcompile.quantization.loss_sensitivity import LOSS_SENSITIVITY, LossSensitivity, loss_sensitivity
from qpcompile.quantization.products import rows_of
from qpcompile.quantization.rounding_error import Reader, input_cost, readers, weight_cost
from qpcompile.recipe.plan import SiteBits
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

Part = Literal["weights", "activations"]
Cost = Callable[[InputStatistics, Sequence[Reader], int], float]


@dataclass(frozen=True)
class AssignBits:
    """See the module's docstring. Raises CalibrationError for a site that no sample reached."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "assign_bits"
    purpose: ClassVar[str] = "Assign 4 or 8 bits to each site by what its rounding costs, under a budget of mean bits."
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `bits` in the facts of stubs, `plan.bits` and `program.measured[LOSS_SENSITIVITY]`; the graphs are
        unchanged.
        """
        scheme = program.recipe.quantize
        if scheme is None or not scheme.mean_bits.asked or program.plan.bits:
            return False
        if LOSS_SENSITIVITY not in program.measured:
            program.measured[LOSS_SENSITIVITY] = self._sensitivity(program)
        sensitivity, costs = program.measured[LOSS_SENSITIVITY], _costs(scheme)
        asked: dict[Part, float | None] = {
            "weights": scheme.mean_bits.weights,
            "activations": scheme.mean_bits.activations,
        }
        for part, mean in asked.items():
            if mean is not None:
                _assign(program, part, mean, list(_sites(program, sensitivity, costs[part])))
        return False

    def _sensitivity(self, program: Program) -> LossSensitivity:
        """Measured, or restored from an interrupted compile: its other contents depend on the bits."""
        with program.checkpoint.found(self.name) as kept:
            if kept is not None:
                kept.fits({})
                return kept.read(LossSensitivity)
        found = loss_sensitivity(program, self.samples, self.count, self.name)
        program.checkpoint.save(self.name, {}, vars(found))
        return found


def _costs(scheme: QuantizeScheme) -> dict[Part, Cost]:
    """The cost of a site with a number of bits."""
    return {
        "weights": lambda statistics, linears, bits: weight_cost(
            statistics, linears, scheme.weights.model_copy(update={"bits": bits})
        ),
        "activations": lambda statistics, linears, bits: input_cost(
            statistics, linears, scheme.activations.model_copy(update={"bits": bits})
        ),
    }


def _assign(program: Program, part: Part, mean: float, sites: list[Site]) -> None:
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
            cost=site.low,
            cost_raised=site.high,
        )
        for site in sites
    ]
    program.plan = program.plan.changed(bits=(*program.plan.bits, *found))


def _sites(program: Program, sensitivity: LossSensitivity, cost: Cost) -> Iterator[Site]:
    """Every input of quantized linears, once, with its costs."""
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
            weights = {
                own.site: rows_of(on.weight(graph.module, weight_name(linear)).detach())
                for linear in stub.users
                if (own := stub_fact(linear.args[1])) is not None  # type: ignore[arg-type]
            }
            linears = readers(statistics, weights, sensitivity)
            low, high = (cost(statistics, linears, bits) for bits in (LOW, HIGH))
            yield Site(fact.site, sum(weight.numel() for weight in weights.values()), low, high)


def _inputs(graph: Graph) -> Iterator[fx.Node]:
    """The stubs of linear inputs."""
    for stub in list(calls(graph, QUANT_STUB)):
        fact = stub_fact(stub)
        if fact is not None and fact.role == "activation":
            yield stub
