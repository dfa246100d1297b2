"""The end-to-end compile pipeline; its passes are listed in pass_list.py.

transformers VLM --capture--> Program --passes--> Program --emit--> CompiledVLM | artifact folder | ONNX folder
                                 |  verified after every pass  |
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qpcompile.capture.blank import blank_sample
from qpcompile.capture.capture import capture
from qpcompile.capture.load import load_model
from qpcompile.capture.quantized import grids
from qpcompile.capture.samples import Samples, Source
from qpcompile.capture.sets_of_values import MOST_SAMPLES
from qpcompile.capture.weights import check_model
from qpcompile.claims import held_folder
from qpcompile.compiled import CompiledVLM
from qpcompile.emit.artifact.template.chat_template import check_processor
from qpcompile.emit.artifact.tokenizer_file import check_tokenizer
from qpcompile.errors import CalibrationError
from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.mapped_tensors import Offload
from qpcompile.ir.numerics import check_numerics
from qpcompile.ir.pass_manager import PASS_RUNS, PassRun, defects, run_passes
from qpcompile.ir.program import Program
from qpcompile.pass_list import passes
from qpcompile.pruning.pruner import check_layers
from qpcompile.pruning.states import check_states
from qpcompile.pruning.table import PRUNERS, check_method
from qpcompile.quality.meter import QualityMeter
from qpcompile.quality.raising import next_step
from qpcompile.quantization.grids import GRIDS
from qpcompile.quantization.solve import needs_moments
from qpcompile.ranks import Ranks
from qpcompile.recipe.plan import CalibrationUsed
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.placement import compute_device
from qpcompile.runtime.recompute import check_answers
from qpcompile.versions import package_versions, tell_newer

_LOG = logging.getLogger("qpcompile")


def compile(
    model: PreTrainedModel | str | PathLike[str],
    recipe: Recipe | str | PathLike[str],
    *,
    processor: Any = None,
    calibration: Source | None = None,
    after: Callable[[PassRun, Program], None] | None = None,
    resume: str | PathLike[str] | None = None,
    device: torch.device | str | int | None = None,
    offload: str | PathLike[str] | None = None,
    ranks: Ranks | None = None,
) -> CompiledVLM:
    """Compile a vision-language model by a recipe for weights, activations, KV cache and visual tokens.

    Args:
        model: a transformers model, or the folder or hub name of one. The model itself is not modified; if the caller
            keeps it, its weights stay in memory in addition to the compiled ones.
        recipe: the name of a preset, the path of a YAML file, or a Recipe.
        processor: the transformers processor; loaded with the model if a folder or name is given. A folder without one
            is compiled if `calibration` is model inputs.
        calibration: model inputs as `processor(...)` returns them (any iterable), or the path of a data folder.
        after: called after each pass with its PassRun and the program, for reports and dumps.
        resume: a checkpoint folder for the long passes; an interrupted compile resumes from it. Only one compile can
            use it at a time.
        device: where calibration, training, solving and measuring compute, one block of the model at a time; the
            weights wait where they are. By default where the model is. The compiled model is where the model was, and
            so are its capture and its final check.
        offload: a folder with room for the model's weights. Weights that passes change or pack are written to files
            there, block by block, instead of being kept in memory. The files have no names: nothing remains.
        ranks: the processes that share this compile (`qpcompile.torchrun.joined`); each calls this function with the
            same arguments, and gets the same model. Only rank 0 writes to `resume`.

    Raises CalibrationError if the recipe needs calibration samples and there are none, RecipeError for exact numerics
    of a model in half precision or on a GPU, ExportError for a processor whose chat template or tokenizer no artifact
    may contain, OutputError for a checkpoint folder that is in use, damaged or foreign, KernelError for a device that
    torch cannot compute on, RankError if ranks differ or one of them has ended, QualityError if the answers agree less
    with full precision than the recipe demands, and InvariantError if decoding of the compiled model does not match
    recomputation (qpcompile/runtime/recompute.py).
    """
    tell_newer()
    computes = None if device is None else compute_device(device)
    kept_in = Offload.open(offload)
    recipe = Recipe.load(recipe)
    check_method(recipe)
    ranks = ranks or Ranks()
    inputs = calibration is not None and not isinstance(calibration, (str, PathLike))
    with _progress(resume, ranks) as progress:
        source, held = (model, None) if isinstance(model, (str, PathLike)) else (None, model)
        del model
        if source is not None:
            held, processor = load_model(source, processor, inputs)
        else:
            check_model(held)
        assert held is not None
        check_numerics(recipe, held.parameters())
        check_processor(processor)
        check_tokenizer(processor)
        samples = _samples(calibration, processor, recipe)
        made: tuple[str, ...] = ()
        while True:
            if held is None:
                assert source is not None
                held = load_model(source, processor, inputs)[0]
            example = samples.example() if samples else blank_sample(held, processor)
            program = capture(held, example, recipe, islice(samples or (), MOST_SAMPLES))
            program.device, program.offload, program.ranks = computes, kept_in, ranks
            if source is not None:
                program.measured[GRIDS] = grids(source, held)
            # From here on only the graphs hold the weights, and a weight that a pass replaces is freed unless the
            # caller holds it, or a compile that may start again.
            held = None if source is not None or not recipe.quality.may_raise else held
            key = checkpoint_key(program, samples) if progress is not None or ranks.size > 1 else ""
            about = f"{key}\n{_threads(program)}\n{'no ' if resume is None else ''}checkpoint folder"
            ranks.agree("model, recipe, samples, versions, threads and checkpoint", about.__str__)
            if progress is not None and not made:
                program.checkpoint = Checkpoint.open(progress, key, ranks)
            compiled = compile_captured(program, processor, samples, after, meter(samples, processor, recipe), made)
            del program
            if (step := next_step(compiled.plan)) is None:
                return compiled
            recipe, made = step.recipe, (*made, step.override)
            _LOG.info("%s; starting again with %s", step.reason, step.override)
            del compiled


def _progress(resume: str | PathLike[str] | None, ranks: Ranks) -> AbstractContextManager[Path | None]:
    """The checkpoint folder, held by rank 0."""
    if resume is None or not ranks.leads:
        return nullcontext(None if resume is None else Path(resume))
    return held_folder(resume)


def _samples(calibration: Source | None, processor: Any, recipe: Recipe) -> Samples | None:
    if calibration is not None:
        asked = recipe.calibration
        return Samples(calibration, processor, asked.samples, asked.seed, spare=recipe.quality.samples)
    if needs := needs_samples(recipe):
        raise CalibrationError(
            f"this recipe measures on samples, and none were given: {'; '.join(needs)}",
            where="calibration",
            do="pass calibration=..., or take the settings named above out of the recipe",
        )
    return None


def meter(samples: Samples | None, processor: Any, recipe: Recipe) -> QualityMeter | None:
    """What measures agreement with full precision; None where nothing is changed or nothing is measured."""
    unchanged = recipe.quantize is None and recipe.tokens.method == "none"
    if recipe.quality.samples == 0 or unchanged:
        return None
    if samples is None:
        if recipe.quality.min_agreement is not None:
            raise CalibrationError(
                "agreement is demanded, and there are no samples to measure it on",
                where="quality.min_agreement",
                do="pass calibration=..., or set it to null",
            )
        return None
    held, apart = samples.held_out(recipe.quality.samples)
    return QualityMeter(held, len(held), apart, processor)


def compile_captured(
    program: Program,
    processor: Any,
    samples: Samples | None,
    after: Callable[[PassRun, Program], None] | None = None,
    measured_by: QualityMeter | None = None,
    raised: tuple[str, ...] = (),
) -> CompiledVLM:
    """Run all remaining passes on `program`, by its recipe; the compiled model takes ownership of it.

    With `measured_by`, agreement with the program as it is now is measured, and is in the plan, with what was `raised`.
    """
    check_method(program.recipe)
    check_layers(program.recipe, len(program.layers))
    check_states(program)
    listed = passes(samples or (), len(samples) if samples else 0)
    if measured_by is not None:
        measured_by.before(program)
    steps = [*(program.measured.get(PASS_RUNS) or ())]
    for item in listed:
        if item.name in program.history:
            continue
        steps += run_passes(program, [item], after)
        program.ranks.agree(f"the plan after {item.name}", program.plan.to_yaml)
        if measured_by is not None:
            measured_by.after(item.name, program)
        if program.stage == "canonical":
            # Traces, and graphs that were replaced, are cycles: they would hold weights that later passes replace.
            gc.collect()
    program.measured[PASS_RUNS] = steps
    # The passes have iterated over the samples: their digest is known by now.
    used = CalibrationUsed(samples=len(samples), sha256=samples.digest()) if samples else CalibrationUsed()
    program.plan = program.plan.changed(calibration=used, versions=package_versions())
    with defects(program, "binding"):
        compiled = CompiledVLM(program, processor)
    asked = samples or [blank_sample(program.host, processor)]
    with defects(program, "the final check"):
        check_answers(program, compiled.machine, asked)
    if measured_by is not None:
        program.plan = program.plan.changed(quality=measured_by.finish(compiled.machine, raised))
    return compiled


def checkpoint_key(program: Program, samples: Samples | None) -> str:
    """The inputs of a compile that identify its checkpoint, as text: recipe, samples, versions and weights."""
    total = hashlib.sha256()
    for module in (program.host, *(graph.module for graph in program.graphs.values())):
        for name, tensor in module.state_dict().items():
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    parts = {
        "weights": total.hexdigest(),
        "samples": samples.digest() if samples else None,
        "recipe": program.recipe.to_dict(),
        "versions": package_versions(),
    }
    return json.dumps(parts, indent=1)


def _threads(program: Program) -> str:
    """What decides the order of sums beside the key: the device, and threads of a process."""
    return f"{torch.get_num_threads()} threads on {(program.device or torch.device('cpu')).type}"


def needs_samples(recipe: Recipe) -> list[str]:
    """The settings of a recipe that need calibration samples, in words."""
    needs = []
    scheme = recipe.quantize
    if scheme is not None and scheme.kv_cache.center:
        needs.append("quantize.kv_cache.center (false needs none)")
    if scheme is not None and scheme.weights.bits != 16:
        asked = {
            f"weights.solver {scheme.weights.solver} (rtn needs none)": needs_moments(scheme.weights),
            "smooth (null needs none)": scheme.smooth is not None,
            "center (null needs none)": scheme.center is not None,
            f"scaling {scheme.scaling} (none needs none)": scheme.scaling != "none",
            "activations.clip_search (false needs none)": scheme.activations.clip_search,
            "activations.granularity modality (token needs none)": scheme.activations.granularity == "modality",
            f"transform {scheme.transform} (hadamard needs none)": scheme.transform in ("rotation", "flatquant"),
            "mean_bits (null needs none)": scheme.mean_bits.asked,
            f"simulation {scheme.simulation}": scheme.simulation != "none",
        }
        needs += [f"quantize.{key}" for key, measures in asked.items() if measures]
    if recipe.tokens.method != "none" and PRUNERS[recipe.tokens.method].profiles(recipe):
        needs.append("tokens.candidate_layers auto (a list of layers needs none)")
    return needs
