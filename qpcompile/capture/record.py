"""Run one small `generate` and record how transformers calls each component of a VLM."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from qpcompile.errors import CaptureError, ModelError
from qpcompile.ir.structure import CACHE_ARGUMENT
from qpcompile.runtime.arguments import keyword_arguments

PROJECTORS = ("multi_modal_projector", "connector", "embed_vision")


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

    def first(self, component: str, occurrence: int = 0) -> Call | None:
        """Call number `occurrence` of a component, or None if there were fewer calls."""
        found = [call for call in self.calls if call.component == component]
        return found[occurrence] if occurrence < len(found) else None


def find_components(model: PreTrainedModel) -> dict[str, str]:
    """Dotted module names of the vision tower, the projector, the decoder and the head of a VLM.

    Raises ModelError for a model that has no vision tower or no decoder of its own.
    """
    names = {id(module): name for name, module in model.named_modules()}
    tower = model.get_encoder(modality="image")
    decoder = model.get_decoder()
    if tower is None or tower is model or decoder is None or decoder is model or not model.can_generate():
        missing = "vision tower" if tower is None or tower is model else "decoder of its own"
        raise ModelError(
            f"{type(model).__name__} is not a vision-language model that generates text: it has no {missing}",
            where=f"model type '{model.config.model_type}'",
            do="pass a model that loads with transformers.AutoModelForImageTextToText",
        )
    components = {"vision": names[id(tower)], "language": names[id(decoder)]}
    for root in (model, model.base_model):
        for attribute in PROJECTORS:
            module = getattr(root, attribute, None)
            if module is not None and "projector" not in components:
                components["projector"] = names[id(module)]
    head = model.get_output_embeddings()
    if head is not None:
        components["head"] = names[id(head)]
    return components


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
        settings: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1}
        # A cache created without the config keeps all tokens in every layer: masks apply the windows, as in our graphs.
        settings |= {"use_cache": True, CACHE_ARGUMENT: DynamicCache()}
        try:
            cast(Any, model).generate(**copy.deepcopy(inputs), **settings)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__}.generate failed on the sample used for tracing: {error}",
                where=f"inputs {sorted(inputs)}",
                do="check that model.generate(**sample) works before compiling",
            ) from error
    if recording.first("vision") is None:
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
    return recording


def _entry(recording: Recording, component: str) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.calls.append(Call(component, copy.deepcopy(keyword_arguments(module, args, kwargs))))

    return hook


def _exit(recording: Recording, component: str) -> Any:
    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = next(call for call in reversed(recording.calls) if call.component == component)
        call.output = copy.deepcopy(output)

    return hook
