"""Run one small `generate` and record how transformers calls each component of a VLM."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from qpcompile.capture.sample import PICTURES
from qpcompile.errors import CaptureError, ModelError
from qpcompile.ir.structure import CACHE_ARGUMENT, cached_tokens, named_tensors
from qpcompile.runtime.arguments import keyword_arguments
from qpcompile.runtime.model_inputs import is_encoder_decoder, with_prompt
from qpcompile.runtime.prepare import EMBEDDINGS, MASK, embedded

PROJECTORS = ("multi_modal_projector", "connector", "embed_vision")
TWO_TOKENS = {
    "max_new_tokens": 2,
    "min_new_tokens": 2,
    "do_sample": False,
    "num_beams": 1,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@dataclass
class Call:
    """One call of one component: its keyword arguments and what it returned."""

    component: str
    inputs: dict[str, Any]
    output: Any = None


@dataclass
class Recording:
    """The calls of one prefill and one decode step, and which module each component is."""

    owners: dict[str, str]
    calls: list[Call] = field(default_factory=list)
    # Weights in components that code outside of them reads too.
    outside: set[str] = field(default_factory=set)
    # Of both new tokens, f[B, 2, V].
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def first(self, component: str, occurrence: int = 0) -> Call | None:
        """Call number `occurrence` of a component, or None if there were fewer calls."""
        found = [call for call in self.calls if call.component == component]
        return found[occurrence] if occurrence < len(found) else None


def find_components(model: PreTrainedModel) -> dict[str, str]:
    """Dotted module names of the vision tower, the projector, the decoder and the head of a VLM.

    A model whose pictures have no tower of their own (patches or codes of pictures are tokens of the decoder) has no
    "vision". Raises ModelError for a model that takes no pictures, does not generate, or has no decoder of its own.
    """
    names = {id(module): name for name, module in model.named_modules()}
    _check_kind(model)
    tower, decoder = _part(model.get_encoder, modality="image"), _part(model.get_decoder)
    if (
        isinstance(decoder, PreTrainedModel)
        and decoder is not model
        and _part(decoder.get_output_embeddings) is not None
    ):
        # A language model with its head: the decoder is what the head reads.
        inner = _part(decoder.get_decoder)
        decoder = inner if inner is not None and inner is not decoder else getattr(decoder, "model", decoder)
    if is_encoder_decoder(model):
        # A language model of both: its own decoder, and the encoder if no tower stands alone.
        inner = _part(decoder.get_decoder) if isinstance(decoder, PreTrainedModel) else None
        decoder = inner if id(inner) in names else decoder
        tower = tower if _apart(tower, decoder) else _part(model.get_encoder)
    if id(decoder) not in names or decoder is model:
        raise _not_vlm(model, "it has no decoder of its own")
    components = {"language": names[id(decoder)]}
    if id(tower) in names and tower is not model and _apart(tower, decoder):
        components["vision"] = names[id(tower)]
    for root in (model, model.base_model):
        for attribute in PROJECTORS:
            module = getattr(root, attribute, None)
            if module is not None and "projector" not in components:
                components["projector"] = names[id(module)]
    head = model.get_output_embeddings()
    if head is not None and _apart(head, decoder):
        components["head"] = names[id(head)]
    return components


def _check_kind(model: PreTrainedModel) -> None:
    """Raise ModelError for a model that is known not to be captured, before it runs."""
    if not model.can_generate():
        raise _not_vlm(model, "it has no generate")
    takes = inspect.signature(type(model).forward).parameters
    if not any(name.startswith(PICTURES) for name in takes):
        raise _not_vlm(model, f"its forward takes no pictures ({', '.join(PICTURES)})")


def _not_vlm(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} is not a vision-language model that generates text: {reason}",
        where=f"model type '{model.config.model_type}'",
        do="pass a model that loads with transformers.AutoModelForImageTextToText",
    )


def _part(find: Callable[..., Any], **which: Any) -> Any:
    """A part of a model, or None where the model's own code fails to find one."""
    try:
        return find(**which)
    except (AttributeError, ValueError, KeyError, TypeError, NotImplementedError):
        return None


def _apart(part: Any, decoder: Any) -> bool:
    """Whether a part is no part of the decoder, whose graph it would be in, nor the decoder one of it."""
    if not isinstance(part, torch.nn.Module) or not isinstance(decoder, torch.nn.Module):
        return False
    return all(part is not other for other in decoder.modules()) and all(decoder is not one for one in part.modules())


def whole_cache(model: PreTrainedModel, used: object = None) -> Cache:
    """An empty cache in which every layer keeps all tokens: masks apply the windows, as in our graphs.

    Layers of a convolution or a recurrence keep their states, and layers that choose what they attend to the keys that
    they choose by, as the configuration says. used: the cache that a call was recorded with.
    """
    if is_encoder_decoder(model) or isinstance(used, EncoderDecoderCache):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    try:
        cache = DynamicCache(config=model.config)
    except (AttributeError, KeyError, ValueError, TypeError):
        return DynamicCache()
    if not any(map(_has_more, cache.layers)):
        return DynamicCache()
    # The length of a cache is that of its first layer which may have keys: layers without any have to stay.
    kept: list[Any] = [whole_layer(layer) for layer in cache.layers]
    cache.layers = kept
    return cache


def whole_layer(layer: Any) -> Any:
    """A layer of a cache without a window; one that keeps states keeps them beside all tokens."""
    if isinstance(layer, LinearAttentionCacheLayerMixin) and isinstance(layer, DynamicSlidingWindowLayer):
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return layer if _has_more(layer) or isinstance(layer, DummyLayer) else DynamicLayer()


def _has_more(layer: Any) -> bool:
    """Whether a layer of a cache keeps more than keys and values, or something else."""
    chooses = isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)
    return isinstance(layer, LinearAttentionCacheLayerMixin) or (chooses and type(layer) is not DynamicLayer)


def record(model: PreTrainedModel, inputs: dict[str, Any]) -> Recording:
    """Generate two tokens from `inputs` and record every call of every component.

    Args:
        model: a transformers VLM in eval mode.
        inputs: what `model.generate(**inputs)` takes.
    """
    recording = Recording(find_components(model))
    with ExitStack() as stack:
        for component, name in recording.owners.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(_entry(recording, component), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_exit(recording, component), with_kwargs=True).remove)
            _watch(stack, recording, name, module)
        settings: dict[str, Any] = dict(TWO_TOKENS)
        settings |= {"use_cache": True, CACHE_ARGUMENT: whole_cache(model)}
        inputs = with_prompt(model, inputs)
        try:
            answer = cast(Any, model).generate(**copy.deepcopy(inputs), **settings)
            recording.logits = torch.stack(answer.logits, dim=1)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__}.generate failed on the sample used for tracing: {error}",
                where=f"inputs {sorted(inputs)}",
                do="check that model.generate(**sample) works before compiling",
            ) from error
    if "vision" in recording.owners and recording.first("vision") is None:
        raise CaptureError(
            "the vision tower was not called on the sample used for tracing",
            where=f"inputs {sorted(inputs)}",
            do="give a sample with a picture in it",
        )
    if recording.first("language", 1) is None:
        raise CaptureError(
            f"{type(model).__name__}.generate does not call its decoder once per step",
            where=recording.owners["language"],
            do="this family drives its decoder in a way that cannot be captured yet",
        )
    _check_decoder(model, recording)
    return recording


def _watch(stack: ExitStack, recording: Recording, name: str, module: torch.nn.Module) -> None:
    """Note the weights of parts of a component that are called while the component itself is not running."""
    running: list[None] = []

    def part_called(path: str) -> Any:
        def hook(part: torch.nn.Module, _args: Any) -> None:
            if not running:
                recording.outside.update(f"{name}.{path}.{own}" for own, _ in part.named_parameters(recurse=False))

        return hook

    def start(*_: Any) -> None:
        running.append(None)

    def end(*_: Any) -> None:
        running.pop()

    stack.callback(module.register_forward_pre_hook(start).remove)
    stack.callback(module.register_forward_hook(end, always_call=True).remove)
    for path, part in module.named_modules():
        if path:
            stack.callback(part.register_forward_pre_hook(part_called(path)).remove)


def _check_decoder(model: PreTrainedModel, recording: Recording) -> None:
    """Raise CaptureError for a decoder without embeddings of tokens, or one that adds tokens of its own to them."""
    for occurrence in (0, 1):
        call = recording.first("language", occurrence)
        assert call is not None
        embeds, cache = call.inputs.get(EMBEDDINGS), call.inputs.get(CACHE_ARGUMENT)
        if not isinstance(embeds, torch.Tensor):
            problem = "takes neither token ids nor embeddings of them"
        else:
            known = embeds.shape[1] + cached_tokens(cache)
            masks = [mask.shape[-1] for _, mask in named_tensors(call.inputs.get(MASK))]
            if all(length == known for length in masks):
                continue
            problem = f"has {known} tokens, cached and new, and a mask of {masks[0]}"
        raise CaptureError(
            f"the decoder of {type(model).__name__} {problem}",
            where=f"{recording.owners['language']}, called with {', '.join(sorted(call.inputs))}",
            do="this family cannot be captured yet: its decoder adds tokens itself, or caches only some",
        )


def _entry(recording: Recording, component: str) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = copy.deepcopy(keyword_arguments(module, args, kwargs))
        recording.calls.append(Call(component, embedded(module, arguments) if component == "language" else arguments))

    return hook


def _exit(recording: Recording, component: str) -> Any:
    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = next(call for call in reversed(recording.calls) if call.component == component)
        call.output = copy.deepcopy(output)

    return hook
