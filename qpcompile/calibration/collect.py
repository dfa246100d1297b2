"""Collect statistics of the inputs of quantized linears, by modality and without padding, on calibration samples.

Layer by layer: all samples run through one layer before any runs through the next, so that memory holds the statistics
of one layer, and of each sample only the inputs of the next layer.

Second moments at an input of experts are collected for each expert too, on the tokens that chose it.

Several ranks share the samples, in turns of one sample each (site_sums.py); when all samples have passed a layer, every
rank gets the statistics of all its sites.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import fx

from qpcompile.calibration.blocks import Block, Look, Values, split_blocks
from qpcompile.calibration.modality_ratios import Found, ModalityGradients
from qpcompile.calibration.site_sums import SiteSums
from qpcompile.calibration.statistics import ROWS, Calibration, InputStatistics, Shelf, expert_site
from qpcompile.errors import CalibrationError, InputError
from qpcompile.ir.edit import is_call
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import EXPERT_LINEAR, SELECT_TOKENS
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.progress import track
from qpcompile.ranks import Ranks, turns
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.placement import Placement


def collect(program: Program, samples: Iterable[dict[str, Any]], count: int, title: str, moments: bool) -> Calibration:
    """Statistics of all activation stubs on `count` samples, whose embeddings are all in memory; all at home.

    `moments`: whether to collect second moments, for the weight solver. After a token cut only kept tokens count.
    Raises CalibrationError naming the sample or site.
    """
    scheme = program.recipe.quantize
    assert scheme is not None
    weigh, on = scheme.scaling == "mbq", Placement.of(program)
    found = Calibration(Shelf(program.offload.folder))
    collector = _Collector(program, title, count, moments, -(-ROWS // count), weigh, on, found)
    if not collector.restore():
        flows = collector.flows(samples, count)
        for name in _in_order(flows, program.ranks):
            collector.walk(program.graphs[name], flows.pop(name, []))
        collector.finish()
    collector.found.samples = count
    collector.found.ratios = collector.gradients.ratios()
    return collector.found


def run_sample(machine: Machine, sample: dict[str, Any], number: int) -> None:
    """Run one prefill; errors of transformers become a CalibrationError naming the sample."""
    with _naming(number, sample):
        machine.prefill(sample)


@contextmanager
def _naming(number: int, keys: Iterable[str]) -> Iterator[None]:
    try:
        yield
    except (InputError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise CalibrationError(
            f"the model does not take this sample: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=f"calibration sample {number}, keys {sorted(keys)}",
            do="build samples with this model's own processor, one picture for each picture in the text",
        ) from error


class _Reached(Exception):
    """Raised when the decoder is called: the inputs of every graph are then known."""


@dataclass
class _Flow:
    """One call of a graph: its inputs, then the live values between two layers.

    visual, counts: bool[B, S] over the decoder's current tokens: which are visual, and which count; None if the tokens
    are not the prompt's.
    """

    number: int
    keys: tuple[str, ...]
    feeds: dict[str, torch.Tensor]
    visual: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    values: Values = field(default_factory=dict)


@dataclass
class _Collector:
    program: Program
    title: str
    count: int
    moments: bool
    keep: int
    weigh: bool
    on: Placement
    found: Calibration
    gradients: ModalityGradients = field(default_factory=ModalityGradients)
    walked: list[str] = field(default_factory=list)

    def flows(self, samples: Iterable[dict[str, Any]], count: int) -> dict[str, list[_Flow]]:
        """Every call of every graph, up to the decoder."""
        held: dict[str, list[_Flow]] = {}
        latest: dict[str, Any] = {}

        def execute(graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            flow = _Flow(latest["number"], latest["keys"], feeds)
            held.setdefault(graph.name, []).append(flow)
            if graph.name != PREFILL:
                return self.on.run(graph, feeds)
            flow.visual, flow.counts = machine.marks(*feeds["inputs_embeds"].shape[:2])
            if self.weigh and flow.number >= done:
                head = self.program.graphs.get(HEAD)
                found.append(self.gradients.measure(graph, head, feeds, flow.visual, flow.counts, self.on))
            raise _Reached

        done, ranks = self._restore_gradients(), self.program.ranks
        found: list[Found] = []
        with Machine(self.program, execute) as machine, self._track("inputs", count) as step:
            for number, sample in enumerate(samples):
                if ranks.mine(number):
                    latest = {"number": number, "keys": tuple(sample)}
                    with suppress(_Reached):
                        run_sample(machine, sample, number)
                step()
                last = number + 1 == count
                if not self.weigh or number < done or not (last or ranks.closes(number)):
                    continue
                for each in chain.from_iterable(ranks.gathered(found)):
                    self.gradients.add(each)
                found.clear()
                if last or self.program.checkpoint.due():
                    self._save_gradients(number + 1)
        return held

    def walk(self, graph: Graph, flows: list[_Flow]) -> None:
        """All calls of one graph, a layer at a time."""
        entry, blocks = split_blocks(graph)
        numbers = self.program.ranks.gathered([flow.number for flow in flows])
        with self._track(graph.name, len(blocks)) as step, torch.no_grad():
            with self.on.holding():
                for flow in self._in_turns(flows, numbers, True):
                    flow.visual, flow.counts = self.on.there((flow.visual, flow.counts))
                    with _naming(flow.number, flow.keys):
                        flow.values = self.on.back(entry.run(flow.feeds, self.on, self._look(flow), plain=False))
                    flow.feeds = {}
            for block in blocks:
                with self.on.holding():
                    self._through(block, flows, numbers)
                step()

    def _track(self, what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        return track(f"{self.title} {what}", total, shown=self.program.ranks.leads)

    def _in_turns(self, flows: list[_Flow], numbers: list[list[int]], adds: bool) -> Iterator[_Flow]:
        """This rank's calls, one a turn; after a turn the statistics of all ranks' calls are added."""
        own = iter(flows)
        for turn in turns(numbers):
            if self.program.ranks.rank in turn:
                yield next(own)
            if adds:
                self.sums.end_turn(turn)

    def _through(self, block: Block, flows: list[_Flow], numbers: list[list[int]]) -> None:
        """Run all calls through one layer and store its statistics on the shelf, collected now or restored."""
        kept = self._restore(block.name)
        for flow in self._in_turns(flows, numbers, kept is None):
            with _naming(flow.number, flow.keys):
                look = self._look(flow, adds=kept is None)
                flow.values = self.on.back(block.run(flow.values, self.on, look, plain=False))
        found = self.sums.take(self.on.home)
        if kept is None:
            self._save(block.name, found)
        self.found.inputs.update(found if kept is None else kept)
        self.walked.append(block.name)

    def _look(self, flow: _Flow, adds: bool = True) -> Look:
        chosen: dict[fx.Node, torch.Tensor] = {}

        def look(node: fx.Node, value: Any) -> Any:
            if node in self.choices:
                chosen[node] = value
            if is_call(node, SELECT_TOKENS) and flow.visual is not None:
                index, flow.counts = value
                flow.visual = flow.visual.gather(1, index)
            fact = stub_fact(node)
            if adds and fact is not None and fact.role == "activation":
                visual, counts = _marks(flow, value)
                self.sums.add(fact.site, value, visual, counts)
                if node in self.experts and self.moments:
                    count, index = self.experts[node]
                    choice = chosen[index] if index in chosen else self.on.there(flow.values[index])
                    for expert, rows in _by_expert(value, choice, counts, count):
                        self.sums.add(expert_site(fact.site, expert), rows)
            return value

        return look

    def restore(self) -> bool:
        """Restore the statistics of an interrupted compile; returns whether they are complete."""
        with self.program.checkpoint.found(self.title) as kept:
            if kept is None:
                return False
            kept.fits({})
            blocks = kept.read(dict[Literal["blocks"], list[str]])["blocks"]
        done = self._restore_gradients() if self.weigh else self.count
        held = [self._restore(name) for name in blocks]
        if done < self.count or None in held:
            return False
        for statistics in held:
            self.found.inputs.update(statistics or {})
        return True

    def finish(self) -> None:
        """Mark the calibration as complete in the checkpoint."""
        self.program.checkpoint.save(self.title, {}, {"blocks": self.walked})

    def _save(self, block: str, found: dict[str, InputStatistics]) -> None:
        tensors = {
            f"{site}/{name}": tensor
            for site, statistics in found.items()
            for name, tensor in statistics.tensors().items()
        }
        self.program.checkpoint.save(f"{self.title} {block}", tensors, {"sites": list(found)})

    def _restore(self, block: str) -> dict[str, InputStatistics] | None:
        with self.program.checkpoint.found(f"{self.title} {block}") as kept:
            if kept is None:
                return None
            found = {}
            for site in kept.read(dict[Literal["sites"], list[str]])["sites"]:
                names = [name for name in kept.tensors if name.startswith(f"{site}/")]
                held = {name.removeprefix(f"{site}/"): kept.tensors.pop(name) for name in names}
                found[site] = InputStatistics.checked(held, self.widths[site], self.moments)
            kept.fits({})
            return found

    @functools.cached_property
    def sums(self) -> SiteSums:
        """The statistics of the current layer."""
        return SiteSums(self.program.ranks, self.widths, self.moments, self.keep, self.found.inputs)

    @functools.cached_property
    def stubs(self) -> dict[str, list[fx.Node]]:
        """The activation stubs of all graphs, by site."""
        found: dict[str, list[fx.Node]] = {}
        for graph in self.program.graphs.values():
            for node in graph.nodes:
                if (fact := stub_fact(node)) is not None and fact.role == "activation":
                    found.setdefault(fact.site, []).append(node)
        return found

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """Channels of every activation stub, by site; of experts also by the name of each expert's statistics."""
        found: dict[str, int] = {}
        for site, stubs in self.stubs.items():
            width = int(stubs[-1].meta["val"].shape[-1])
            count = max((self.experts[stub][0] for stub in stubs if stub in self.experts), default=0)
            found |= {site: width, **{expert_site(site, expert): width for expert in range(count)}}
        return found

    @functools.cached_property
    def experts(self) -> dict[fx.Node, tuple[int, fx.Node]]:
        """How many experts read a stub, and the choice of each token, i[N, J], by stub."""
        return {
            stub: (int(product.args[1].meta["val"].shape[0]), product.args[2])  # type: ignore[union-attr,misc]
            for stubs in self.stubs.values()
            for stub in stubs
            for product in stub.users
            if is_call(product, EXPERT_LINEAR)
        }

    @functools.cached_property
    def choices(self) -> set[fx.Node]:
        """The choices of all tokens."""
        return {index for _, index in self.experts.values()}

    def _save_gradients(self, samples: int) -> None:
        sums = {"visual": self.gradients.visual, "text": self.gradients.text}
        tensors = {f"{kind}/{site}": tensor for kind, found in sums.items() for site, tensor in found.items()}
        self.program.checkpoint.save(f"{self.title} gradients", tensors, {"samples": samples})

    def _restore_gradients(self) -> int:
        """Restore the gradients from the checkpoint; returns the number of samples they cover."""
        with self.program.checkpoint.found(f"{self.title} gradients") as kept:
            if kept is None:
                return 0
            sites = {name.partition("/")[2] for name in kept.tensors} & set(self.widths)
            names = {kind: {f"{kind}/{site}": site for site in sites} for kind in ("visual", "text")}
            dtype = next((tensor.dtype for tensor in kept.tensors.values() if tensor.is_floating_point()), None)
            kept.fits({name: ((2,), dtype or torch.float32) for held in names.values() for name in held})
            samples = kept.read(dict[Literal["samples"], int])["samples"]
            if not 0 < samples <= self.count:
                raise ValueError(f"it is of {samples} samples")
            self.gradients.visual.update({site: kept.tensors[name] for name, site in names["visual"].items()})
            self.gradients.text.update({site: kept.tensors[name] for name, site in names["text"].items()})
            return samples


def _marks(flow: _Flow, value: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which rows of a value, f[..., C], are visual, and which count, bool[...]; None if they are not tokens.

    Layers of experts flatten the tokens: f[B S, C], or f[B S, I, C].
    """
    if flow.counts is None or flow.visual is None:
        return None, None
    rows = value.shape[:-1]
    if rows == flow.counts.shape:
        return flow.visual, flow.counts
    if len(rows) > 2 or rows[0] != flow.counts.numel():
        return None, None
    wide = (rows[0], *[1] * (len(rows) - 1))
    visual, counts = (each.reshape(wide).expand(rows) for each in (flow.visual, flow.counts))
    return visual, counts


def _by_expert(
    x: torch.Tensor, choice: torch.Tensor, counts: torch.Tensor | None, experts: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """x: f[N, I, C], choice: i[N, J], counts: bool[N, I] -> each expert that was chosen, and its rows, f[n, C]."""
    slots = choice.unflatten(1, (x.shape[1], -1))
    for expert in range(experts):
        own = (slots == expert).any(dim=-1)
        rows = x[own if counts is None else own & counts]
        if len(rows):
            yield expert, rows


def _in_order(flows: dict[str, list[_Flow]], ranks: Ranks) -> list[str]:
    """The graphs that any rank has called, in the order in which a single process would have called them first."""
    firsts = [(calls[0].number, place, name) for place, (name, calls) in enumerate(flows.items())]
    return list(dict.fromkeys(name for *_, name in sorted(chain.from_iterable(ranks.gathered(firsts)))))
