"""What the layers of a small model compute in one forward pass, recorded by hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn


@dataclass
class Seen:
    """What hooks recorded in one forward pass; with `attn_implementation="eager"` attention is its weights."""

    inputs: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)  # of decoder layers: f32[B, L, C]
    outputs: list[Tensor] = field(default_factory=list)  # of decoder layers: f32[B, L, C]
    attention: list[Tensor] = field(default_factory=list)  # of decoder layers: f32[B, H, L, L]
    tower: list[Tensor] = field(default_factory=list)  # outputs of the tower's layers: f32[B, N, C], CLIP with CLS
    tower_attention: list[Tensor] = field(default_factory=list)  # CLIP's: f32[B, H, N, N]


def decoder_layers(model: Any) -> list[nn.Module]:
    """Layers of the language model."""
    return list(model.model.language_model.layers)


def tower_layers(model: Any) -> list[nn.Module]:
    """Layers of the tower whose output is read."""
    if hasattr(model.model, "visual"):
        return list(model.model.visual.blocks)
    layers = list(model.model.vision_tower.encoder.layers)
    return layers[: len(layers) + 1 + model.config.vision_feature_layer]


def first_output(output: Any) -> Tensor:
    """What a layer returns, without what some classes return beside it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def recorded(model: Any) -> Iterator[Seen]:
    """Records inputs, outputs and attention of layers; LLaVA's tower has its attention recorded, Qwen's has windows."""
    seen = Seen()
    handles = []
    for layer in decoder_layers(model):

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.inputs.append((args[0], kwargs))

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda _m, _a, out: seen.outputs.append(first_output(out))))
        attend = cast(nn.Module, layer.self_attn)
        handles.append(attend.register_forward_hook(lambda _m, _a, out: seen.attention.append(out[1])))
    for layer in tower_layers(model):
        handles.append(layer.register_forward_hook(lambda _m, _a, out: seen.tower.append(first_output(out))))
        if hasattr(layer, "self_attn"):
            attend = cast(nn.Module, layer.self_attn)
            handles.append(attend.register_forward_hook(lambda _m, _a, out: seen.tower_attention.append(out[1])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
