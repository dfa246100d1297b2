"""Take one family through every step, in this process; `run.py` calls `main` in a process for each family.

FILE becomes JSON: step -> {"result": ..., "seconds": s, "reason": text}, where a result is ok, refused (an error of
ours), bare (any other exception), different (answers that should be equal), or absent (not built). It is written after
each step, so that a step that kills the process is seen by its absence.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Cases, Inputs, build
from shape import SHAPES

import qpcompile
from qpcompile.capture.capture import capture
from qpcompile.capture.samples import Samples
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.onnx.runner.folder import RunnerError
from qpcompile.errors import PlanError, QPCompileError
from qpcompile.ir.edit import clone
from qpcompile.ir.program import PREFILL, Program
from qpcompile.pipeline import compile_captured
from qpcompile.pruning.pruner import attention_layers
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe

NEW_TOKENS = 5
# Different summation orders; the logits are of order 1. A wrong mask, position or window changes them by 0.01 and more.
TOLERANCE = 1e-4
# Presets without training: what is shown is that a family runs, not how well it answers.
RECIPES = {
    "prune-30": ("prune-30", []),
    "w4a8": ("w4a8kv4", []),
    "w4a4": ("w4a4kv4", ["quantize.transform=hadamard"]),
}
STEPS = ("build", "capture", "none", "save", *RECIPES, "onnx")


class Different(Exception):
    """Answers that should be equal are not."""


def answer(model: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy answer: ids i64[B, new] and logits f32[B, new, V] of the new tokens."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(**copy.deepcopy(inputs), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)
    return result.sequences[:, -NEW_TOKENS:], torch.stack(result.logits, dim=1)


def check_same(found: Any, expected: Any, inputs: Cases) -> None:
    """The same tokens and logits for every prompt."""
    for case, prompt in inputs.items():
        (tokens, logits), (others, rows) = answer(expected, prompt), answer(found, prompt)
        distance = float((logits - rows).abs().max())
        if not torch.equal(tokens, others) or not distance < TOLERANCE:
            raise Different(f"{case}: logits differ by {distance:.2g}, {int((tokens != others).sum())} tokens")


def compiled_by(program: Program, preset: str, changes: list[str], samples: list[Inputs]) -> CompiledVLM:
    """A copy of a captured program, compiled by a preset."""
    recipe = Recipe.load(preset).with_overrides([*changes, "quality.samples=0"])
    graphs = {name: clone(graph) for name, graph in program.graphs.items()}
    plan = Plan(recipe=recipe, layers=program.layers)
    mine = Program(graphs, copy.deepcopy(program.host), program.layers, recipe, plan)
    return compile_captured(mine, None, Samples(samples, None, len(samples), 0))


class Road:
    """The steps of one family; each reads what earlier ones left."""

    def __init__(self, name: str, shape: str) -> None:
        self.name, self.shape = name, SHAPES[shape]
        self.compiled: dict[str, CompiledVLM] = {}
        self.note = ""

    def build(self) -> None:
        self.model, self.cases = build(self.name, self.shape)

    def capture(self) -> None:
        self.program = capture(self.model, copy.deepcopy(self.cases["one"]), Recipe.load("none"))
        self.note = "; ".join(f"{item.graph}: {item.reason}" for item in self.program.plan.left_out)

    def none(self) -> None:
        self.compiled["none"] = compiled_by(self.program, "none", [], [self.cases["one"]])
        check_same(self.compiled["none"], self.model, self.cases)

    def save(self) -> None:
        self._reload("none")

    def recipe(self, step: str) -> None:
        preset, changes = RECIPES[step]
        samples = [self.cases["one"], self.cases["longer"]]
        try:
            self.compiled[step] = compiled_by(self.program, preset, changes, samples)
        except PlanError as error:
            # Layers of random weights have no profile to choose by: the first two that can score tokens are named.
            layers = sorted(attention_layers(self.program.graphs[PREFILL]) - {self.program.layers[-1].index})[:2]
            if error.do is None or "tokens.candidate_layers" not in str(error) or not layers:
                raise
            named = [*changes, f"tokens.candidate_layers={layers}"]
            self.compiled[step] = compiled_by(self.program, preset, named, samples)
        self._reload(step)

    def onnx(self) -> None:
        from qpcompile.emit.onnx.runner.runner import OnnxVLM

        with tempfile.TemporaryDirectory() as folder:
            # A family may need a vision graph for each size of picture.
            self.compiled["none"].export_onnx(Path(folder) / "onnx", check=list(self.cases.values()))
            runner = OnnxVLM(Path(folder) / "onnx", threads=1)
            for case, inputs in self.cases.items():
                given: dict[str, Any] = {key: np.asarray(value) for key, value in inputs.items()}
                found = np.asarray(runner.generate(**given, max_new_tokens=NEW_TOKENS))[:, -NEW_TOKENS:]
                expected = answer(self.compiled["none"], inputs)[0].numpy()
                if not np.array_equal(found, expected):
                    raise Different(f"{case}: {int((found != expected).sum())} tokens differ in onnxruntime")

    def _reload(self, step: str) -> None:
        """Save, load, and compare the answers of both."""
        with tempfile.TemporaryDirectory() as folder:
            self.compiled[step].save_pretrained(Path(folder) / "out")
            loaded = qpcompile.load(Path(folder) / "out")
            for case, inputs in self.cases.items():
                (tokens, logits), (others, rows) = answer(self.compiled[step], inputs), answer(loaded, inputs)
                if not bool(logits.isfinite().all()):
                    raise Different(f"{case}: logits are not finite")
                # Loaded weights lie elsewhere in memory, which may change the order of sums.
                distance = float((logits - rows).abs().max())
                if not torch.equal(tokens, others) or distance > TOLERANCE:
                    raise Different(f"{case}: the loaded model's logits differ by {distance:.2g}")


def attempt(step: Callable[[], None]) -> dict[str, Any]:
    """Run one step; how it ended."""
    start = time.perf_counter()
    result, reason = "ok", ""
    try:
        step()
    except (QPCompileError, RunnerError) as error:
        result, reason = "refused", f"{type(error).__name__}: {error}"
    except Different as error:
        result, reason = "different", str(error)
    except Exception as error:  # noqa: BLE001 - what the row records
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "qpcompile" in frame.filename]
        seen = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-3:], place])
        result, reason = "bare", f"{type(error).__name__}: {str(error)[:300]} [{seen}]"
    # Folders for temporary files have another name every time.
    reason = reason.replace(tempfile.gettempdir(), "TMPDIR")
    return {"result": result, "seconds": round(time.perf_counter() - start, 1), "reason": reason}


# What a step needs to have ended well.
NEEDS = {"capture": "build", "none": "capture", "save": "none", "onnx": "none"} | dict.fromkeys(RECIPES, "capture")


def main(name: str, target: Path, steps: list[str], shape: str = "standard") -> None:
    """Run the steps and write the file after each."""
    torch.set_num_threads(1)
    road, rows = Road(name, shape), dict[str, dict[str, Any]]()
    for step in steps:
        if step in NEEDS and (step not in steps or rows.get(NEEDS[step], {}).get("result") not in ("ok", "different")):
            continue
        method = getattr(road, step, None) or (lambda step=step: road.recipe(step))
        rows[step] = attempt(method)
        if step == "build" and rows[step]["result"] != "ok":
            rows[step]["result"] = "absent"  # a package is missing, or the family has no such model: no defect of ours
        rows[step] |= {"note": road.note} if step == "capture" and road.note else {}
        target.write_text(json.dumps(rows, indent=1))
