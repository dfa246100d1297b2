"""Replace every stub by Q-VLM's quantizer in floating point: a simulation to reproduce published settings.

    %y = linear(quant_stub(%x), quant_stub(@w), @b)
      -> %r = qpcompile::simulate_qvlm(%x, @low, @high);  %y = linear(%r, @w, @b)      @w rounded to NF4, stored wide

Nothing gets smaller or faster, and the ONNX export refuses the operator. Source: see `kernels/simulate_qvlm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpcompile.calibration.statistics import CALIBRATION, Calibration
from qpcompile.errors import CalibrationError
from qpcompile.ir.edit import add_tensor, aten, call, calls, get_tensor, is_call, set_tensor, tidy
from qpcompile.ir.node_facts import QuantizedFact, set_fact, stub_fact
from qpcompile.ir.operators import QUANT_STUB, SIMULATE_QVLM
from qpcompile.ir.program import Graph, Program
from qpcompile.kernels.simulate_qvlm.reference import nf4
from qpcompile.quantization.basis import weight_name
from qpcompile.recipe.plan import Site
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

KERNEL = "simulation: NF4 weights, inputs per channel, in floating point"


@dataclass(frozen=True)
class SimulateQvlm:
    """See the module's docstring."""

    name: ClassVar[str] = "simulate_qvlm"
    purpose: ClassVar[str] = (
        "Replace every stub by Q-VLM's quantizer in floating point: a simulation to reproduce published settings."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "packed"

    def run(self, program: Program) -> bool:
        """Returns whether any linear was changed; fills `plan.sites`."""
        scheme = program.recipe.quantize
        if scheme is None or scheme.simulation != "qvlm":
            return False
        rounded, on = dict[str, torch.Tensor](), Placement.of(program)
        sites: list[Site] = []
        for graph in program.graphs.values():
            for stub in list(calls(graph, QUANT_STUB)):
                fact = stub_fact(stub)
                if fact is not None and fact.role == "activation":
                    sites += _replace(graph, stub, fact.site, program.measured[CALIBRATION], rounded, on)
            tidy(graph)
        program.plan = program.plan.changed(sites=(*program.plan.sites, *sites))
        return bool(sites)


def _replace(
    graph: Graph, stub: fx.Node, site: str, calibration: Calibration, rounded: dict[str, torch.Tensor], on: Placement
) -> list[Site]:
    """Fake-quantize one input and the weights of the linears that read it."""
    statistics = calibration.inputs.get(site)
    if statistics is None or not len(statistics.rows):
        raise CalibrationError(
            "the ranges of an input are not known: no calibration sample reached it",
            where=site,
            do="give samples that use it, or add it to quantize.ignore",
        )
    name = f"simulated.{site.replace('.', '_')}"
    low = add_tensor(graph, f"{name}_low", statistics.rows.amin(dim=0), stub)
    high = add_tensor(graph, f"{name}_high", statistics.rows.amax(dim=0), stub)
    given = call(graph, stub, SIMULATE_QVLM, stub.args[0], low, high)
    sites = []
    for linear in list(stub.users):
        weight_stub = linear.args[1]
        assert is_call(linear, aten.linear.default) and isinstance(weight_stub, fx.Node)
        fact, weight = stub_fact(weight_stub), weight_name(linear)
        assert fact is not None
        exact = get_tensor(graph.module, weight).detach()
        if fact.site not in rounded:
            rounded[fact.site] = on.keep(nf4(on.there(exact)))
        error = float((rounded[fact.site] - exact).norm() / exact.norm().clamp(min=1e-30))
        set_tensor(graph.module, weight, rounded[fact.site])
        source = weight_stub.args[0]
        assert isinstance(source, fx.Node)
        linear.replace_input_with(weight_stub, source)
        linear.replace_input_with(stub, given)
        set_fact(linear, QuantizedFact((fact.site,), KERNEL))
        sites.append(
            Site(graph=graph.name, name=fact.site, weight_bits=4, activation_bits=4, error=error, kernel=KERNEL)
        )
    return sites
