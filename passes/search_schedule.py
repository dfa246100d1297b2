"""Try token schedules on samples, quantized, and keep the one whose next token is closest to the full model's.

    cost of a schedule = mean over samples of KL( p || p' )

p is the full-precision model's distribution of the answer's first token with all visual tokens, p' that of the model
with the schedule's cuts and the method's own scores, quantized as the recipe says (in floating point, at the quant
stubs). All schedules have the mean that the recipe asks for. The worse half goes after an eighth of the samples, half
of the rest after three eighths: what is left is compared on all of them.

Ours: QUOTA (arXiv 2604.17320, section 3.2) shares a fixed drop by each layer's own deviation instead. The search is
successive halving (Jamieson and Talwalkar, arXiv 1502.07943).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.budget import ratio_fraction
from qpcompile.ir.collect import run_sample
from qpcompile.ir.edit import clone
from qpcompile.ir.facts import stub_fact
from qpcompile.ir.fake_quant import StubRounding
from qpcompile.ir.interpret import run_watched
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.ir.pruners.joint import Joint
from qpcompile.ir.pruners.table import PRUNERS
from qpcompile.ir.run import COUNT, VALID, VISUAL, Machine, execute_graph
from qpcompile.ir.schedules import Shares, cut_layers_of, schedules
from qpcompile.passes.insert_token_cuts import cut_prefill
from qpcompile.plan import Cut
from qpcompile.progress import track


@dataclass(frozen=True)
class SearchSchedule:
    """See the module's docstring. For the method `joint` only."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "search_schedule"
    needs: ClassVar[str] = "calibrated"
    gives: ClassVar[str] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `program.facts["schedule"]`; the graphs stay as they are."""
        tokens = program.recipe.tokens
        if tokens.method == "none" or not isinstance(PRUNERS[tokens.method], Joint) or "schedule" in program.facts:
            return False
        if tokens.keep_of != "mean":
            raise PlanError(
                "joint searches schedules with one mean; the share behind the last cut is its own to choose",
                where="tokens.keep_of",
                do="write mean",
            )
        count = min(self.count, tokens.trial_samples)
        trials = _Trials(program, schedules(tokens.keep, len(program.layers)))
        with track("search_schedule", count) as step:
            for number, sample in enumerate(itertools.islice(self.samples, count)):
                run_sample(trials.machine, sample, number)
                if number + 1 in (count // 8, count * 3 // 8):
                    trials.halve()
                step()
        program.facts["schedule"] = trials.best()
        return False


class _Trials:
    """Runs the prefill graph in full precision, then quantized with each schedule that is left."""

    def __init__(self, program: Program, candidates: list[Shares]) -> None:
        self.program = program
        self.graphs = {shares: _with_cuts(program, shares) for shares in candidates}
        self.costs = dict.fromkeys(candidates, 0.0)
        self.machine = Machine(program, self.execute)
        scheme = program.recipe.quantize
        self.rounding = None if scheme is None else StubRounding(scheme)

    def halve(self) -> None:
        """Keep the cheaper half; equal costs: the earlier candidate."""
        order = sorted(self.costs, key=lambda shares: self.costs[shares])
        self.costs = {shares: self.costs[shares] for shares in order[: (len(order) + 1) // 2]}

    def best(self) -> Shares:
        """The cheapest schedule."""
        return min(self.costs, key=lambda shares: self.costs[shares])

    def execute(self, graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a graph; on prefill, try the schedules."""
        results = execute_graph(graph, feeds)
        if graph.name == PREFILL:
            visual, valid = self.machine.visual, self.machine.valid
            assert visual is not None and valid is not None
            count = torch.arange(int(visual.sum(dim=1).min()))
            feeds = {**feeds, VISUAL: visual, VALID: valid, COUNT: count}
            expected = self.next_token(results)
            for shares in self.costs:
                found = self.next_token(run_watched(self.graphs[shares], feeds, self.quantize))
                self.costs[shares] += float((expected.exp() * (expected - found)).sum(dim=-1).mean())
        return results

    def next_token(self, results: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of the first new token, f32[B, vocabulary]."""
        last = next(iter(results.values()))[:, -1:]
        if HEAD in self.program.graphs:
            head = self.program.graphs[HEAD]
            last = next(iter(execute_graph(head, {head.inputs[0]: last}).values()))
        return last[:, 0].float().log_softmax(dim=-1)

    def quantize(self, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        """A stub's value as the operators will see it."""
        fact = stub_fact(node)
        return value if fact is None or self.rounding is None else self.rounding(value, fact)


def _with_cuts(program: Program, shares: Shares) -> Graph:
    """The prefill graph with the cuts of a schedule."""
    graph, recipe = clone(program.graphs[PREFILL]), program.recipe
    cuts = tuple(
        Cut(layer=layer, ratio=share, numerator=numerator, denominator=denominator)
        for layer, share in cut_layers_of(shares)
        for numerator, denominator in [ratio_fraction(share)]
    )
    cut_prefill(graph, cuts, recipe, PRUNERS[recipe.tokens.method])
    return graph
