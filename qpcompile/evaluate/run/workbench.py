"""Compile one model by many recipes, with shared work done once.

A compile here gives the same plan and bytes as `qpcompile.compile`. Shared are the captured graphs; the program after
the passes that do not read `tokens`, for recipes that differ in nothing else; and the layer sensitivity, for recipes
that differ only in the decisions based on it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qpcompile.capture.blank import blank_sample
from qpcompile.capture.capture import capture
from qpcompile.capture.load import load_model
from qpcompile.capture.quantized import grids
from qpcompile.capture.samples import Samples
from qpcompile.capture.sets_of_values import MOST_SAMPLES
from qpcompile.compiled import CompiledVLM
from qpcompile.errors import CalibrationError
from qpcompile.ir.pass_manager import PassRun
from qpcompile.ir.program import Program
from qpcompile.pipeline import compile_captured, needs_samples
from qpcompile.pruning.budget import DEVIATIONS
from qpcompile.quantization.grids import GRIDS
from qpcompile.recipe.plan import LayerFacts
from qpcompile.recipe.recipe import Recipe

# The last pass that reads no key under `tokens`.
SHARED_UP_TO = "train_transforms"
# Keys under `tokens` that measure_sensitivity reads.
SENSITIVITY_KEYS = ("eta", "sensitivity_of", "sensitivity_input")


class Workbench:
    """See the module's docstring.

    Args:
        source: folder or hub name of a transformers model.
        calibration: data folder, or None for recipes that need no samples.
        device: where compiles compute; by default the processor.
    """

    def __init__(self, source: str, calibration: Path | None, device: torch.device | None = None) -> None:
        self.source, self.calibration, self.device = source, calibration, device
        self.model: PreTrainedModel
        self.model, self.processor = load_model(source)
        self.grids = grids(source, self.model)
        self._captured: Program | None = None
        self._shared: tuple[str, Program] | None = None
        self._sensitivity: dict[str, MeasuredSensitivity] = {}

    def captured(self, recipe: Recipe) -> tuple[Program, Samples | None]:
        """A new program with this recipe, sharing the model's weights, and the samples the recipe selects."""
        samples = None
        asked = recipe.calibration
        if self.calibration is not None:
            samples = Samples(self.calibration, self.processor, asked.samples, asked.seed)
        if self._captured is None:
            example = samples.example() if samples else blank_sample(self.model, self.processor)
            self._captured = capture(self.model, example, recipe, islice(samples or (), MOST_SAMPLES))
            self._captured.device = self.device
        program = copied(self._captured, recipe)
        program.measured[GRIDS] = self.grids
        return program, samples

    def compile(self, recipe: Recipe) -> CompiledVLM:
        """Compile the model by this recipe, like `qpcompile.compile`."""
        program, samples = self.captured(recipe)
        if samples is None and (needs := needs_samples(recipe)):
            raise CalibrationError(
                f"this recipe measures on samples, and none were given: {'; '.join(needs)}",
                where="calibration",
                do="name a calibration folder, or take the settings named above out of the recipe",
            )
        if samples is not None:
            program = self._recall(program)
        return compile_captured(program, self.processor, samples, self._remember)

    def _recall(self, program: Program) -> Program:
        """The program with the shared state of earlier compiles restored."""
        recipe = program.recipe
        if self._shared is not None and self._shared[0] == _without_tokens(recipe):
            program = copied(self._shared[1], recipe)
        if (found := self._sensitivity.get(_sensitivity_key(recipe))) is not None and recipe.tokens.method != "none":
            program.measured[DEVIATIONS] = copy.deepcopy(found.deviations)
            program.plan = program.plan.changed(facts=found.facts)
        return program

    def _remember(self, step: PassRun, program: Program) -> None:
        """After a pass: save the state that later compiles can start from, before later passes modify it."""
        assert self._captured is not None
        if step.name == SHARED_UP_TO:
            # A host that has run is bound to this program: the copy gets an unbound one.
            apart = dataclasses.replace(program, host=self._captured.host)
            self._shared = _without_tokens(program.recipe), copied(apart, program.recipe)
        if step.name == "measure_sensitivity" and DEVIATIONS in program.measured:
            found = MeasuredSensitivity(copy.deepcopy(program.measured[DEVIATIONS]), program.plan.facts)
            self._sensitivity[_sensitivity_key(program.recipe)] = found


@dataclass(frozen=True)
class MeasuredSensitivity:
    """The results of the pass measure_sensitivity: layer -> deviations, and the facts of the plan."""

    deviations: dict[int, list[float]]
    facts: tuple[LayerFacts, ...]


def _without_tokens(recipe: Recipe) -> str:
    """A recipe without its `tokens`, as text."""
    return json.dumps({key: value for key, value in recipe.to_dict().items() if key != "tokens"}, sort_keys=True)


def _sensitivity_key(recipe: Recipe) -> str:
    """The parts of a recipe that measure_sensitivity reads, as text."""
    tokens = recipe.to_dict()["tokens"]
    return _without_tokens(recipe) + json.dumps({key: tokens[key] for key in SENSITIVITY_KEYS}, sort_keys=True)


def copied(program: Program, recipe: Recipe) -> Program:
    """A copy of a program with this recipe; tensors are shared.

    Passes replace tensors of graphs, they never write into one.
    """
    modules = [program.host, *(graph.module for graph in program.graphs.values())]
    made = copy.deepcopy(program, {id(tensor): tensor for tensor in _tensors(modules)})
    made.recipe = recipe
    made.plan = made.plan.changed(recipe=recipe)
    return made


def _tensors(modules: list[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
