"""Load a model whose weights stay in its safetensors files and are read when something computes with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from qpcompile.capture.checkpoint_files import weight_files
from qpcompile.ir.mapped_tensors import map_file, mapped

_LOG = logging.getLogger("qpcompile")
# The types that checkpoint_files.py lets through.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "BOOL": torch.bool,
}


def can_map(folder: Path, config: Any) -> bool:
    """Whether all weights of a folder are in the safetensors files that transformers reads by default."""
    files = weight_files(folder)
    elsewhere = getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", ())
    return bool(files) and not elsewhere and all(path.suffix == ".safetensors" for path in files)


def mapped_model(folder: Path, config: Any, model_class: type[PreTrainedModel]) -> tuple[Any, Mapping[str, Any]]:
    """The model in a folder, and transformers' report of how its tensors fit: as `from_pretrained` gives them.

    A weight is in memory only where transformers makes it anew: from a tensor of another type, or of several.
    `from_pretrained` itself maps files too, but for writing, which counts towards limits of memory (ulimit -d, strict
    overcommit).
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors.update(mapped_file(path))
    untyped: Any = model_class
    model, found = untyped.from_pretrained(
        None, config=config, state_dict=tensors, ignore_mismatched_sizes=True, output_loading_info=True
    )
    model.config.name_or_path = model.name_or_path = str(folder)
    model.generation_config = _generation_config(folder)
    _tell(model, {tensor.data_ptr() for tensor in tensors.values()}, folder)
    return model, found


def mapped_file(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file that has been checked (checkpoint_files.py).

    The format asks for no alignment and kernels do: a tensor that lies across its type is copied.
    """
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(start - 8))
        memory = map_file(file)
    found: dict[str, torch.Tensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensor = mapped(memory, _TYPES[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0])
            found[name] = tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
    return found


def _generation_config(folder: Path) -> GenerationConfig:
    """As `from_pretrained` reads it: a file of its own, or what config.json says."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def _tell(model: PreTrainedModel, places: set[int], folder: Path) -> None:
    """Log how much of a model stays in its files."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.data_ptr() in places] += parameter.nbytes
    rest = f", {sizes[False] / 1e6:,.0f} MB were converted in memory" if sizes[False] else ""
    _LOG.info("weights: %s MB stay in %s and are read by the block%s", f"{sizes[True] / 1e6:,.0f}", folder, rest)
