"""Which recipes a checkpoint of the format compressed-tensors can hold, and the nearest one where it cannot.

The format has weights of 4 or 8 bits, and inputs that the runtime rounds per token. It has no token cuts, no operators
of ours between layers, and no cache but one that the runtime rounds in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator

from qpcompile.errors import ExportError
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.recipe.recipe import Recipe

FORMAT = "compressed-tensors"
# Ranges of 8-bit inputs that readers of the format have: absmax / 127 (vLLM), and absmax / 127.5 (the package itself).
CLIPS = (1.0, 254 / 255)


def refuse_recipe(recipe: Recipe) -> None:
    """Raise ExportError, with the settings to change, for a recipe that the format cannot hold."""
    if recipe.quantize is None:
        raise ExportError(
            "nothing is quantized by this recipe: transformers' save_pretrained writes such a model",
            where="recipe",
            do="take the recipe w4a16, or any other that quantizes weights",
        )
    found = list(misfits(recipe, recipe.quantize))
    if not found:
        return
    raise ExportError(
        f"a checkpoint of the format {FORMAT} cannot hold this recipe: {'; '.join(why for _, why in found)}",
        where="recipe",
        do=f"the nearest that it holds: {' '.join(f'--set {override}' for override, _ in found)}",
    )


def misfits(recipe: Recipe, scheme: QuantizeScheme) -> Iterator[tuple[str, str]]:
    """(override that mends it, reason) for each setting that the format cannot hold."""
    if recipe.tokens.method != "none":
        yield "tokens.method=none", f"tokens.method {recipe.tokens.method} cuts tokens, and a checkpoint has no cuts"
        yield "tokens.keep=1.0", "every token is kept then"
    if scheme.weights.bits == 16:
        yield "quantize.weights.bits=4", "no weights are quantized"
    yield from _inputs(scheme)
    yield from _bases(scheme)
    if scheme.kv_cache.bits != 16:
        yield "quantize.kv_cache.bits=16", "the cache belongs to the runtime, not to the checkpoint"
        if scheme.kv_cache.center:
            yield "quantize.kv_cache.center=false", "no mean of keys is subtracted then"
        if scheme.kv_cache.granularity == "kivi":
            yield "quantize.kv_cache.granularity=token-head", "kivi rounds the cache"
    if scheme.head_bits != 16:
        yield "quantize.head_bits=16", "readers of the format take the language head as it is"


def _inputs(scheme: QuantizeScheme) -> Iterator[tuple[str, str]]:
    """Settings of linear inputs."""
    inputs = scheme.activations
    if inputs.bits == 4:
        yield "quantize.activations.bits=8", "no reader of the format has integer operators for 4-bit inputs"
        if scheme.mean_bits.activations is not None:
            yield "quantize.mean_bits.activations=null", "all inputs have 8 bits then"
    if inputs.bits == 16:
        return
    if inputs.granularity != "token":
        yield "quantize.activations.granularity=token", "readers round inputs per token"
    if inputs.clip_search:
        yield "quantize.activations.clip_search=false", "a clip ratio per site has no place in it"
    if inputs.clip_ratio not in CLIPS:
        yield "quantize.activations.clip_ratio=1.0", "inputs are scaled by their largest magnitude"


def _bases(scheme: QuantizeScheme) -> Iterator[tuple[str, str]]:
    """Changes of basis: each leaves an operator, a scale or a bias that the model's class has no place for."""
    if scheme.transform != "none":
        yield "quantize.transform=none", f"transform {scheme.transform} computes on the inputs of linears"
    if scheme.smooth is not None:
        yield "quantize.smooth=null", "smooth scales the inputs of output projections, which no norm precedes"
    if scheme.scaling != "none":
        yield "quantize.scaling=none", f"{scheme.scaling} scales the inputs of output projections, likewise"
    if scheme.center is not None:
        yield "quantize.center=null", "center adds biases to linears that have none"
    if scheme.simulation != "none":
        yield "quantize.simulation=none", "a simulation has no codes"
