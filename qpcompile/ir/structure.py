"""Flatten nested arguments and results to tensors with dotted names, and rebuild them (pytrees).

    {"attention_mask": t0, "masks": {"full": t1}, "cache": DynamicCache}
      -> {"attention_mask": t0, "masks.full": t1, "past_key_values.0.key": t2, "past_key_values.0.value": t3}

States of layers without keys and values are `past_states.2.conv.0`, keys and values of cross-attention, which do not
grow, `past_states.2.cross.key`. A cache is `past_key_values` in every graph, even
if the installed transformers uses another name: a graph traced with
one version runs with another.

A template is the same structure with names instead of tensors: plain lists, dicts and strings, so that it can be
written to JSON and a result can be rebuilt from it without importing anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeAlias, cast, get_args

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from qpcompile.ir.names import CACHE, STATE, Name
from qpcompile.nested import is_list, is_mapping

Template: TypeAlias = "str | dict[str, Template] | list[Template] | None"
# The installed transformers' name of a cache, as argument and in results: "past_key_values" in 5.23, "cache" in 5.24.
CACHE_ARGUMENT = next(item.name for item in fields(BaseModelOutputWithPast) if Cache in get_args(item.type))


def named_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts, lists, model outputs and caches, with its dotted name, in flattening order."""
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, EncoderDecoderCache):
        yield from named_tensors(value.self_attention_cache)
        for name, tensor in named_tensors(value.cross_attention_cache):
            yield Name(name).crossing, tensor
    elif isinstance(value, Cache):
        for index, layer in enumerate(value.layers):
            yield from _layer_tensors(layer, index)
    else:
        for key, item in _children(value):
            yield from named_tensors(item, f"{prefix}.{key}" if prefix else str(key))


def cached_tokens(cache: Any) -> Any:
    """The number of tokens in a cache, an integer or a symbolic one: of its first layer with keys."""
    return next((keys.shape[2] for name, keys in named_tensors(cache) if Name(name).in_cache), 0)


def template(value: Any, prefix: str = "") -> Template:
    """The structure of a result with names for tensors; caches are handled separately, only their name remains."""
    if isinstance(value, torch.Tensor):
        return prefix
    if isinstance(value, Cache) or value is None:
        return None
    if is_mapping(value):
        named = {CACHE if isinstance(item, Cache) else str(key): item for key, item in value.items()}
        return {key: template(item, f"{prefix}.{key}" if prefix else key) for key, item in named.items()}
    if is_list(value):
        return [template(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in enumerate(value)]
    return None


def rebuild(shape: Template, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Rebuild the result of a template from tensors."""
    if isinstance(shape, str):
        return tensors[shape]
    if isinstance(shape, dict):
        return Result({key: rebuild(item, tensors) for key, item in shape.items()})
    if isinstance(shape, list):
        return tuple(rebuild(item, tensors) for item in shape)
    return None


# Attributes of a layer of a cache, as graphs name them; other tensors go by the attribute's own name.
_KEPT = {"keys": "key", "values": "value"}
_STATES = {"conv_states": "conv", "recurrent_states": "recurrent"}


class Result(dict[str, Any]):
    """A model output by name, by attribute and by position, as transformers' own outputs are."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in order."""
        return tuple(value for value in self.values() if value is not None)


def _layer_tensors(layer: Any, index: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Keys and values, or states, of one layer of a cache, in the order of its attributes."""
    attributes = cast(dict[str, Any], vars(layer))
    for attribute, held in attributes.items():
        if isinstance(held, torch.Tensor) and held.ndim > 1:  # one that holds nothing yet has one axis
            kept = _KEPT.get(attribute)
            yield f"{CACHE}.{index}.{kept}" if kept else f"{STATE}.{index}.{attribute}.0", held
        elif attribute in _STATES:
            for place, state in cast(dict[int, Any], held).items():
                if isinstance(state, torch.Tensor):
                    yield f"{STATE}.{index}.{_STATES[attribute]}.{place}", state


def _children(value: Any) -> Iterator[tuple[str | int, Any]]:
    if is_mapping(value):
        yield from value.items()
    elif is_list(value):
        yield from enumerate(value)
