"""Search the token schedule on samples: the one whose quantized next-token distribution is closest to the full model's.

    cost of a schedule = mean over samples of KL( p || p' )

p is the full-precision model's distribution of the answer's first token with all visual tokens, p' that of the model
with the schedule's cuts and the method's own scores, fake-quantized at the quant stubs by the recipe. All schedules
have the mean that the recipe asks for. The worse half is discarded after an eighth of the samples, half of the rest
after a quarter and after a half; the remaining ones are compared on all samples.

Ours: QUOTA (arXiv 2604.17320, section 3.2) instead distributes a fixed drop by each layer's own deviation. The search
is successive halving (Jamieson and Talwalkar, arXiv 1502.07943).
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from qpcompile.calibration.collect import run_sample
from qpcompile.errors import PlanError
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.edit import clone
from qpcompile.ir.node_facts import numerator_fact, stub_fact
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.passes.insert_token_cuts import cut_prefill
from qpcompile.progress import track
from qpcompile.pruning.budget import ratio_fraction
from qpcompile.pruning.methods.joint import Joint, JointOptions
from qpcompile.pruning.pruner import options_of
from qpcompile.pruning.schedules import SCHEDULE, Shares, cut_layers_of, schedules
from qpcompile.pruning.table import PRUNERS
from qpcompile.quantization.fake_quant import StubRounding
from qpcompile.recipe.plan import Cut
from qpcompile.runtime.interpret import run_watched
from qpcompile.runtime.machine import COUNT, VALID, VISUAL, Machine
from qpcompile.runtime.placement import Placement
from qpcompile.stages import Stage

# Samples whose visual tokens are counted, to build schedules of whole tokens.
COUNTED = 8


@dataclass(frozen=True)
class SearchSchedule:
    """See the module's docstring. Runs for the method `joint` only."""

    samples: Iterable[dict[str, Any]] = field(repr=False)
    count: int
    name: ClassVar[str] = "search_schedule"
    purpose: ClassVar[str] = (
        "Search the token schedule on samples: the one whose quantized next-token distribution is closest to the "
        "full model's."
    )
    needs: ClassVar[Stage] = "calibrated"
    gives: ClassVar[Stage] = "transformed"

    def run(self, program: Program) -> bool:
        """Fills `program.measured[SCHEDULE]`; the graphs are unchanged."""
        tokens = program.recipe.tokens
        if tokens.method == "none" or not isinstance(PRUNERS[tokens.method], Joint) or SCHEDULE in program.measured:
            return False
        if tokens.keep_of != "mean":
            raise PlanError(
                "joint searches schedules with one mean; it chooses the share after the last cut itself",
                where="tokens.keep_of",
                do="write mean",
            )
        count = min(self.count, options_of(JointOptions, program.recipe).trial_samples)
        visual = _visual_tokens(program, itertools.islice(self.samples, COUNTED))
        trials = _Trials(program, schedules(tokens.keep, len(program.layers), visual))
        done = trials.restore(program.checkpoint, count)
        with trials.machine, track(self.name, count) as step:
            for number, sample in enumerate(itertools.islice(self.samples, count)):
                if number >= done:
                    run_sample(trials.machine, sample, number)
                    if number + 1 in (count // 8, count // 4, count // 2):
                        trials.halve()
                    if number + 1 == count or program.checkpoint.due():
                        facts = {"samples": number + 1, "costs": list(trials.costs.items())}
                        program.checkpoint.save(self.name, {}, facts)
                step()
        program.measured[SCHEDULE] = trials.best()
        # Trial graphs are reference cycles: they would keep weights alive that later passes replace.
        del trials
        gc.collect()
        return False


@dataclass(frozen=True)
class _Contents:
    """Contents of a checkpoint: the number of samples seen, and the costs of the remaining schedules."""

    samples: int
    costs: list[tuple[list[float], float]]


class _Trials:
    """Runs the prefill graph in full precision, then quantized with each remaining schedule."""

    def __init__(self, program: Program, candidates: list[Shares]) -> None:
        self.program = program
        self.graphs = _graphs(program, candidates)
        self.costs = dict.fromkeys(candidates, 0.0)
        self.machine = Machine(program, self.execute)
        self.on = Placement.of(program)
        scheme = program.recipe.quantize
        self.rounding = None if scheme is None else StubRounding(scheme, self.on)

    def restore(self, checkpoint: Checkpoint, count: int) -> int:
        """Restore the costs of an interrupted compile; returns the number of samples they cover."""
        with checkpoint.found(SearchSchedule.name) as kept:
            if kept is None:
                return 0
            kept.fits({})
            facts = kept.read(_Contents)
            costs: dict[Shares, float] = {tuple(shares): cost for shares, cost in facts.costs}
            if not costs or not set(costs) <= set(self.costs) or not 0 < facts.samples <= count:
                raise ValueError(f"it has {facts.samples} samples and schedules that are not this model's")
            self.costs = costs
            return facts.samples

    def halve(self) -> None:
        """Keep the cheaper half; ties to the earlier candidate."""
        order = sorted(self.costs, key=lambda shares: self.costs[shares])
        self.costs = {shares: self.costs[shares] for shares in order[: (len(order) + 1) // 2]}

    def best(self) -> Shares:
        """The cheapest schedule."""
        return min(self.costs, key=lambda shares: self.costs[shares])

    def execute(self, graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a graph; on prefill, evaluate the schedules."""
        results = self.on.run(graph, feeds)
        if graph.name == PREFILL:
            visual, valid = self.machine.visual, self.machine.valid
            assert visual is not None and valid is not None
            count = torch.arange(int(visual.sum(dim=1).min()), device=visual.device)
            feeds = {**feeds, VISUAL: visual, VALID: valid, COUNT: count}
            expected = self.next_token(results)
            for shares in self.costs:
                found = self.next_token(run_watched(self.graphs[shares], feeds, self.quantize, self.on))
                self.costs[shares] += float((expected.exp() * (expected - found)).sum(dim=-1).mean())
        return results

    def next_token(self, results: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of the first new token, f32[B, vocabulary]."""
        last = next(iter(results.values()))[:, -1:]
        if HEAD in self.program.graphs:
            head = self.program.graphs[HEAD]
            last = next(iter(self.on.run(head, {head.inputs[0]: last}).values()))
        return last[:, 0].float().log_softmax(dim=-1)

    def quantize(self, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        """A stub's value, fake-quantized."""
        fact = stub_fact(node)
        return value if fact is None or self.rounding is None else self.rounding(value, fact)


def _visual_tokens(program: Program, samples: Iterable[dict[str, Any]]) -> int:
    """The median number of visual tokens in a prompt."""
    counts: list[int] = []
    on = Placement.of(program)

    def count(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if graph.name == PREFILL and machine.visual is not None:
            counts.extend(machine.visual.sum(dim=1).tolist())
        return on.run(graph, feeds)

    with Machine(program, count) as machine:
        for number, sample in enumerate(samples):
            run_sample(machine, sample, number)
    return sorted(counts)[len(counts) // 2]


def _graphs(program: Program, candidates: list[Shares]) -> dict[Shares, Graph]:
    """The prefill graph with the cuts of each schedule; cutting is slow, so schedules with the same layers share it."""
    cut: dict[tuple[int, ...], Graph] = {}
    graphs = {}
    for shares in candidates:
        cuts = tuple(
            Cut(layer=layer, ratio=ratio, numerator=numerator, denominator=denominator)
            for layer, ratio in cut_layers_of(shares)
            for numerator, denominator in [ratio_fraction(ratio)]
        )
        layers = tuple(each.layer for each in cuts)
        if layers not in cut:
            cut[layers] = clone(program.graphs[PREFILL])
            cut_prefill(cut[layers], cuts, program.recipe, PRUNERS[program.recipe.tokens.method], shapes=False)
        graphs[shares] = _with_ratios(cut[layers], cuts)
    return graphs


def _with_ratios(template: Graph, cuts: tuple[Cut, ...]) -> Graph:
    """The same cuts with these keep ratios."""
    graph = clone(template)
    numerators = {cut.layer: cut.numerator for cut in cuts}
    for node in graph.nodes:
        if (fact := numerator_fact(node)) is not None:
            node.update_arg(1, numerators[fact.layer])
    graph.module.recompile()
    return graph
