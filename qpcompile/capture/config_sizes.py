"""Check a configuration against the stored tensors: one that describes a far larger model is refused before allocation.

Two checks, both without reading a weight. Settings that count layers are compared with the number of tensors, since
each layer has at least one. Then the model is built on the meta device, and its parameters are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from qpcompile.capture.checkpoint_files import CONFIG, weight_files
from qpcompile.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
_COUNTS = re.compile(r"\w*(layers?|blocks?|depths?|experts?|stages?)", re.ASCII)
# More modules per stored tensor than any model has: experts may be stored in one tensor.
_MOST_EXPERTS = 1024
# Up to this factor transformers' loading report is more precise about missing or mismatched tensors.
_ROOM = 2
_DO = "give the config.json that belongs to these weights"


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the folder's safetensors files; empty if the weights have another format."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def refuse_counts(config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """Raise ModelError for more layers than there are tensors, naming the setting.

    config: the contents of config.json. shapes: of all tensors in the files.
    """
    most = max(len(shapes), _MOST_EXPERTS)
    for path, value in _numbers(config):
        if shapes and _COUNTS.fullmatch(path.rpartition(".")[2]) and value > most:
            raise ModelError(
                f"{path} is {value} in {CONFIG}, and the files hold {len(shapes)} tensors", where=where, do=_DO
            )


def refuse_larger(config: Any, shapes: Shapes, where: str) -> None:
    """Raise ModelError for a model with far more parameters than the files contain.

    config: the configuration of the model.
    """
    if not shapes:
        return
    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=False)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    if sum(sizes.values()) <= _ROOM * held:
        return
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    large = [f"{path} is {value}" for path, value in _numbers(config.to_dict()) if value > widest]
    first = max(sizes, key=lambda name: sizes[name])
    said = f" ({'; '.join(large[:4])})" if large else ""
    raise ModelError(
        f"by {CONFIG} the model has {sum(sizes.values()):.3g} numbers{said}, the files hold {held:.3g}; {first} alone "
        f"would have {sizes[first]:.3g}",
        where=where,
        do=_DO,
    )


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, integer) of all settings, including those in lists."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item, path)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value
