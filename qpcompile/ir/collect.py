"""Run samples through the graphs and collect what flows into quantized linears: visual or text, padding left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qpcompile.errors import CalibrationError
from qpcompile.ir.edit import is_call
from qpcompile.ir.facts import stub_fact
from qpcompile.ir.interpret import run_watched
from qpcompile.ir.modality_ratios import ModalityGradients
from qpcompile.ir.operators import SELECT_TOKENS
from qpcompile.ir.program import DECODE, HEAD, PREFILL, Graph, Program
from qpcompile.ir.run import Machine, execute_graph
from qpcompile.ir.statistics import ROWS, Calibration, InputStatistics
from qpcompile.progress import track


def collect(program: Program, samples: Iterable[dict[str, Any]], count: int, title: str) -> Calibration:
    """Statistics of all activation stubs on `count` samples; one sample is in memory at a time.

    Behind a token cut only tokens that are still there count. Raises CalibrationError that names the sample or site.
    """
    scheme = program.recipe.quantize
    assert scheme is not None
    collector = _Collector(program, scheme.weights.solver == "gptq", -(-ROWS // count), scheme.scaling == "mbq")
    collector.restore(title)
    with track(title, count) as step:
        for number, sample in enumerate(samples):
            if number >= collector.found.samples:
                run_sample(collector.machine, sample, number)
                collector.found.samples += 1
                if number + 1 == count or program.checkpoint.due():
                    collector.save(title)
            step()
    collector.found.ratios = collector.gradients.ratios()
    _check_finite(collector.found)
    return collector.found


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


@dataclass
class _Collector:
    program: Program
    moments: bool
    keep: int
    weigh: bool
    found: Calibration = field(default_factory=Calibration)
    gradients: ModalityGradients = field(default_factory=ModalityGradients)
    # Of the tokens that the decoder works on now, bool[B, S]: which are visual, and which count.
    visual: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.machine = Machine(self.program, self._execute)

    def save(self, title: str) -> None:
        """Into the checkpoint: what was found on the samples so far."""
        tensors = {
            f"{site}/{name}": tensor
            for site, statistics in self.found.inputs.items()
            for name, tensor in statistics.tensors().items()
        }
        for name, sums in (("visual", self.gradients.visual), ("text", self.gradients.text)):
            tensors.update({f"{site}/gradients/{name}": tensor for site, tensor in sums.items()})
        self.program.checkpoint.save(title, tensors, {"samples": self.found.samples, "sites": list(self.found.inputs)})

    def restore(self, title: str) -> None:
        """From the checkpoint, what `save` left there."""
        kept = self.program.checkpoint.load(title)
        if kept is None:
            return
        tensors, facts = kept
        self.found.samples = facts["samples"]
        for site in facts["sites"]:
            held = {
                name.removeprefix(f"{site}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{site}/")
            }
            self.found.inputs[site] = InputStatistics.of_tensors(held)
            for name, sums in (("visual", self.gradients.visual), ("text", self.gradients.text)):
                if f"gradients/{name}" in held:
                    sums[site] = held[f"gradients/{name}"]

    def _execute(self, graph: Graph, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if graph.name in (HEAD, DECODE):
            return execute_graph(graph, feeds)
        self.visual = self.counts = None
        if graph.name == PREFILL:
            shape = feeds["inputs_embeds"].shape[:2]
            self.visual, self.counts = self.machine.marks(*shape)
            if self.weigh:
                head = self.program.graphs.get(HEAD)
                self.gradients.add(graph, head, feeds, self.visual, self.counts)
        return run_watched(graph, feeds, self._look)

    def _look(self, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        if is_call(node, SELECT_TOKENS) and self.visual is not None:
            index, self.counts = value
            self.visual = self.visual.gather(1, index)
        fact = stub_fact(node)
        if fact is not None and fact.role == "activation":
            if fact.site not in self.found.inputs:
                self.found.inputs[fact.site] = InputStatistics.empty(value.shape[-1], self.moments, value.device)
            of_tokens = self.counts is not None and value.shape[:-1] == self.counts.shape
            marks = (self.visual, self.counts) if of_tokens else (None, None)
            self.found.inputs[fact.site].add(value, self.keep, *marks)
        return value


def _check_finite(found: Calibration) -> None:
    for site, statistics in found.inputs.items():
        if not torch.isfinite(statistics.largest).all():
            raise CalibrationError(
                "calibration produced numbers that are not finite",
                where=site,
                do="check the samples and the model's weights for NaN and infinity",
            )
