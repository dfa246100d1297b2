"""Dry run: what a compile would do, pass by pass, from the recipe and the model's configuration only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from qpcompile.capture.data_folder import read_questions
from qpcompile.capture.load import read_config
from qpcompile.errors import CalibrationError
from qpcompile.ir.pass_manager import Pass
from qpcompile.pass_list import passes
from qpcompile.pipeline import needs_samples
from qpcompile.pruning.methods.joint import JointOptions
from qpcompile.pruning.pruner import check_layers, options_of
from qpcompile.pruning.table import check_method
from qpcompile.quantization.solve import needs_moments
from qpcompile.recipe.recipe import Recipe

NOTHING = "nothing to do for this recipe"


@dataclass(frozen=True)
class Forecast:
    """The forecast of a compile: the model in words, the number of samples used, (pass, what it would do)."""

    model: str
    samples: int
    steps: tuple[tuple[str, str], ...]


def forecast(model: str | PathLike[str], recipe: Recipe, data: Path | None) -> Forecast:
    """Forecast a compile. Raises the errors that a compile would raise without reading weights."""
    config = read_config(model)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    check_method(recipe)
    check_layers(recipe, layers)
    samples = min(len(read_questions(data)), recipe.calibration.samples) if data else 0
    needs = needs_samples(recipe)
    if not samples and (data or needs):
        raise CalibrationError(
            "there is no calibration sample" if data else f"this recipe measures on samples: {'; '.join(needs)}",
            where=str(data) if data else "--data",
            do="give a data folder with at least one line in data.jsonl",
        )
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    words = f"{name}, {layers or '?'} decoder layers"
    return Forecast(words, samples, tuple((item.name, _expected(item, recipe, samples)) for item in passes((), 0)))


def _stubs(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None:
        return NOTHING
    ignored = f"; ignored: {', '.join(scheme.ignore)}" if scheme.ignore else ""
    return f"mark linears and the cache in {', '.join(scheme.scope)}{ignored}"


def _calibrate(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None or scheme.weights.bits == 16 or not samples:
        return NOTHING
    needs = [scheme.weights.solver] if needs_moments(scheme.weights) else []
    needs += ["the bits of weights"] if scheme.mean_bits.weights is not None else []
    more = f" and second moments for {' and '.join(needs)}" if needs else ""
    return f"{samples} samples: ranges{more} at every linear input"


def _transforms(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None:
        return NOTHING
    parts = [f"smooth by {scheme.smooth}"] if scheme.smooth is not None else []
    parts += ["rotate by Hadamard matrices"] if scheme.transform != "none" else []
    parts += ["centre inputs"] if scheme.center is not None else []
    parts += ["rotate queries and keys"] if scheme.kv_cache.bits != 16 and scheme.kv_cache.rotate else []
    return ", ".join(parts) or NOTHING


def _centers(recipe: Recipe, samples: int) -> str:
    if recipe.quantize is None or not recipe.quantize.kv_cache.center or not samples:
        return NOTHING
    return "subtract the mean key of each head before keys are rounded; the key of a sink becomes exact"


def _bits(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None or not scheme.mean_bits.asked:
        return NOTHING
    means = {"weights": scheme.mean_bits.weights, "activations": scheme.mean_bits.activations}
    asked = [f"{mean:g} of {part}" for part, mean in means.items() if mean is not None]
    return f"4 or 8 bits for each site by what they cost, with a mean of {' and '.join(asked)}"


def _clips(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None or scheme.weights.bits == 16 or not scheme.activations.clip_search:
        return NOTHING
    return "search a clip ratio for every quantized input"


def _training(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None or scheme.transform not in ("rotation", "flatquant") or not samples:
        return NOTHING
    used = min(samples, scheme.training.samples)
    return f"{scheme.transform}, block by block, on {used} samples, {scheme.training.epochs} epochs"


def _behind_cuts(recipe: Recipe, samples: int) -> str:
    if recipe.quantize is None or recipe.tokens.method == "none" or not recipe.recalibrates or not samples:
        return NOTHING
    return f"{samples} samples again, on the tokens that each layer still has"


def _sensitivity(recipe: Recipe, samples: int) -> str:
    if recipe.tokens.method == "none" or not samples:
        return NOTHING
    return f"{samples} samples, each layer twice: full precision and quantized; attention mass and redundancy per layer"


def _schedule(recipe: Recipe, samples: int) -> str:
    if recipe.tokens.method != "joint" or not samples:
        return NOTHING
    options = options_of(JointOptions, recipe)
    tried = min(samples, options.trial_samples)
    return (
        f"{tried} samples, scores and schedules with a mean of {recipe.tokens.keep:g}, quantized, on up to "
        f"{options.answer_tokens} tokens of each answer; successive halving on half of them, prices on the rest"
    )


def _budget(recipe: Recipe, samples: int) -> str:
    tokens = recipe.tokens
    if tokens.method == "none":
        return NOTHING
    layers = "chosen by the profile" if tokens.candidate_layers == "auto" else str(list(tokens.candidate_layers))
    return f"{tokens.method}: keep {tokens.keep:g} of the visual tokens in the end, cut after layers {layers}"


def _cuts(recipe: Recipe, samples: int) -> str:
    if recipe.tokens.method == "none":
        return NOTHING
    return "score, select and gather after the chosen layers, in prefill; per-layer cache lengths in decode"


def _simulation(recipe: Recipe, samples: int) -> str:
    if recipe.quantize is None or recipe.quantize.simulation != "qvlm":
        return NOTHING
    return "Q-VLM's quantizer in floating point, instead of integer operators"


def _weights(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None or scheme.weights.bits == 16 or scheme.simulation != "none":
        return NOTHING
    per = "channel" if scheme.weights.granularity == "channel" else f"group of {scheme.weights.group_size}"
    inputs = f"{scheme.activations.bits}-bit inputs" if scheme.activations.bits != 16 else "float inputs"
    return f"int{scheme.weights.bits} by {scheme.weights.solver}, one scale per {per}, for {inputs}"


def _head(recipe: Recipe, samples: int) -> str:
    if recipe.quantize is None or recipe.quantize.head_bits == 16:
        return NOTHING
    return "int8, one scale per output channel, for float inputs; tied token embeddings read the same codes"


def _cache(recipe: Recipe, samples: int) -> str:
    if recipe.quantize is None or recipe.quantize.kv_cache.bits == 16:
        return NOTHING
    return (
        f"keys and values in {recipe.quantize.kv_cache.words}, one scale per token and head, after the rotary embedding"
    )


def _fuse(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None or scheme.weights.bits == 16 or scheme.activations.bits == 16:
        return NOTHING
    return "fuse norm + quantize and silu * up + quantize into one operator each"


def _merge(recipe: Recipe, samples: int) -> str:
    if recipe.quantize is None and recipe.tokens.method == "none":
        return NOTHING
    return "eliminate common subexpressions of cuts and caches"


def _merge_linears(recipe: Recipe, samples: int) -> str:
    scheme = recipe.quantize
    if scheme is None or scheme.weights.bits == 16 or scheme.activations.bits == 16:
        return NOTHING
    return "one product for queries, keys and values, and one for gate and up projections"


def _cache_writes(recipe: Recipe, samples: int) -> str:
    if recipe.quantize is None or recipe.quantize.kv_cache.bits == 16:
        return NOTHING
    return "rotary embedding, rotation, codes and the append to the cache in one operator"


def _widen(recipe: Recipe, samples: int) -> str:
    return "sums in float64: identical codes on all back ends" if recipe.numerics == "exact" else NOTHING


def _expected(item: Pass, recipe: Recipe, samples: int) -> str:
    """What a pass would do for this recipe; its purpose if nothing more is known of it."""
    return EXPECT[item.name](recipe, samples) if item.name in EXPECT else item.purpose


EXPECT: dict[str, Callable[[Recipe, int], str]] = {
    "canonicalize": lambda recipe, samples: "canonical forms of linear, norm and attention",
    "insert_quant_stubs": _stubs,
    "calibrate": _calibrate,
    "fold_transforms": _transforms,
    "center_keys": _centers,
    "assign_bits": _bits,
    "search_clips": _clips,
    "train_transforms": _training,
    "measure_sensitivity": _sensitivity,
    "search_schedule": _schedule,
    "plan_token_budget": _budget,
    "insert_token_cuts": _cuts,
    "recalibrate": _behind_cuts,
    "simulate_qvlm": _simulation,
    "quantize_weights": _weights,
    "quantize_head": _head,
    "quantize_kv_cache": _cache,
    "fuse_kernels": _fuse,
    "merge_duplicates": _merge,
    "merge_linears": _merge_linears,
    "fuse_cache_writes": _cache_writes,
    "widen_sums": _widen,
}
