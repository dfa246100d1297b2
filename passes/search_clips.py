"""Find for each quantized input how far to clip it: the ratio with the least error of what its linears give.

    min over r of  mean over tokens of || W (Q_r(x) - x) ||^2,   scale of Q_r = r max|x| / 7

The mean is taken over visual and over text tokens of the calibration, and the two are added.

A smaller step for the many channels is worth a wrong value in the few that are clipped. The ratio goes into the stub's
fact, and from there into `qpcompile::quantize_int4`; it costs nothing at run time.

Source: the idea of FlatQuant's learned activation clipping (arXiv 2410.09426, section 3.1), by search and not by
gradient, as AWQ does for weights (arXiv 2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from qpcompile.calibration.statistics import CALIBRATION, InputStatistics
from qpcompile.ir.edit import calls, get_tensor
from qpcompile.ir.node_facts import set_fact, stub_fact
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.program import Program
from qpcompile.quantization.basis import weight_name
from qpcompile.quantization.fake_quant import round_trip

RATIOS = tuple(1 - 0.03 * step for step in range(15))


@dataclass(frozen=True)
class SearchClips:
    """See the module's docstring."""

    name: ClassVar[str] = "search_clips"
    needs: ClassVar[str] = "calibrated"
    gives: ClassVar[str] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `clip` in the facts of activation stubs; the graphs stay as they are."""
        scheme = program.recipe.quantize
        if scheme is None or not scheme.activations.clip_search or 16 in (scheme.weights.bits, scheme.activations.bits):
            return False
        inputs, found = program.measured[CALIBRATION].inputs, dict[str, float]()
        for graph in program.graphs.values():
            for stub in list(calls(graph, QUANT_STUB)):
                fact = stub_fact(stub)
                if fact is None or fact.role != "activation" or fact.site not in inputs or fact.clip is not None:
                    continue
                if fact.site not in found:
                    weights = [get_tensor(graph.module, weight_name(linear)).detach() for linear in stub.users]
                    group = scheme.activations.kernel_group
                    found[fact.site] = best_clip(inputs[fact.site], torch.cat(weights), group)
                set_fact(stub, replace(fact, clip=found[fact.site]))
        return False


def best_clip(statistics: InputStatistics, weights: torch.Tensor, group_size: int) -> float:
    """weights: f[N, C] -> the ratio of RATIOS with the least output error, the largest of equals."""
    rows, gram = statistics.rows, weights.float().T @ weights.float()
    # Text tokens are few, and answers are read off them.
    shares = torch.where(statistics.visual, 1 / statistics.visual.sum(), 1 / (~statistics.visual).sum())
    errors = [round_trip(rows, group_size, ratio) - rows for ratio in RATIOS]
    costs = [float(((error @ gram) * error).sum(dim=-1) @ shares) for error in errors]
    return RATIOS[min(range(len(RATIOS)), key=costs.__getitem__)]
