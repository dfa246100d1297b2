"""One model with its calibration data, compiled by many recipes: captured once, measured once per quantizer.

A compile here gives the plan and the bytes that `qpcompile.compile` gives. What is shared is what no later decision
changes: the captured graphs of a seed, and the measurements of two passes, kept under the recipe keys they read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qpcompile.capture.capture import capture
from qpcompile.capture.samples import Samples
from qpcompile.emit.compiled import CompiledVLM
from qpcompile.errors import CalibrationError
from qpcompile.ir.pass_manager import Step
from qpcompile.ir.program import Program
from qpcompile.pipeline import blank_sample, compile_captured, load_model, needs_samples
from qpcompile.plan import LayerFacts
from qpcompile.recipe import Recipe

# Keys under `tokens` that decide after measuring; a key that is not listed here is taken to change what is measured.
DECIDED_LATER = ("keep", "keep_of", "temperature", "weights", "normalize", "percentiles", "seed")


class Workbench:
    """See the module's docstring.

    Args:
        source: folder or hub name of a transformers model.
        calibration: data folder, or None for recipes that need no samples.
    """

    def __init__(self, source: str, calibration: Path | None) -> None:
        self.source, self.calibration = source, calibration
        self.model: PreTrainedModel
        self.model, self.processor = load_model(source)
        self._captured: tuple[int, int, Program] | None = None
        self._measured: dict[str, dict[str, Any]] = {}

    def captured(self, recipe: Recipe) -> tuple[Program, Samples | None]:
        """A program of its own with this recipe, whose weights are the model's; and the samples the recipe draws."""
        samples = None
        asked = recipe.calibration
        if self.calibration is not None:
            samples = Samples(self.calibration, self.processor, asked.samples, asked.seed)
        if self._captured is None or self._captured[:2] != (asked.samples, asked.seed):
            self._measured.clear()
            first = next(iter(samples)) if samples else blank_sample(self.model, self.processor)
            self._captured = asked.samples, asked.seed, capture(self.model, first, recipe)
        program = _copy(self._captured[2])
        program.recipe = recipe
        program.plan = program.plan.changed(recipe=recipe)
        return program, samples

    def compile(self, recipe: Recipe) -> CompiledVLM:
        """What `qpcompile.compile` makes of the model and this recipe."""
        program, samples = self.captured(recipe)
        if samples is None and (needs := needs_samples(recipe)):
            raise CalibrationError(
                f"this recipe measures on samples, and none were given: {'; '.join(needs)}",
                where="calibration",
                do="name a calibration folder, or take the settings named above out of the recipe",
            )
        if samples is not None:
            self._recall(program)
        return compile_captured(program, self.processor, samples, self._remember)

    def _recall(self, program: Program) -> None:
        """Put into the program what an earlier compile has measured."""
        for name in ("calibrate", "measure_sensitivity"):
            found = copy.deepcopy(self._measured.get(_key(name, program.recipe), {}))
            facts: tuple[LayerFacts, ...] | None = found.pop("plan.facts", None)
            program.facts |= found
            if facts is not None:
                program.plan = program.plan.changed(facts=facts)

    def _remember(self, step: Step, program: Program) -> None:
        """After a pass: keep what it measured, before later passes change it."""
        key = _key(step.name, program.recipe)
        if key in self._measured:
            return
        if step.name == "calibrate":
            self._measured[key] = {"calibration": copy.deepcopy(program.facts["calibration"])}
        if step.name == "measure_sensitivity" and "deviations" in program.facts:
            self._measured[key] = {"deviations": program.facts["deviations"], "plan.facts": program.plan.facts}


def _key(name: str, recipe: Recipe) -> str:
    """The recipe keys that a measuring pass reads, as text."""
    asked = recipe.to_dict()
    tokens = {key: value for key, value in asked["tokens"].items() if key not in DECIDED_LATER}
    reads = [asked["quantize"], asked["calibration"], tokens if name == "measure_sensitivity" else None]
    return f"{name} {json.dumps(reads, sort_keys=True)}"


def _copy(program: Program) -> Program:
    """A program whose graphs and host can be changed without changing the original; tensors are shared.

    Passes replace tensors, they never write into one.
    """
    modules = [program.host, *(graph.module for graph in program.graphs.values())]
    return copy.deepcopy(program, {id(tensor): tensor for tensor in _tensors(modules)})


def _tensors(modules: list[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
