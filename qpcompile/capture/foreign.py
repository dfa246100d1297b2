"""Refuse folders and configurations that transformers would silently load as something else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qpcompile.capture.checkpoint_files import FULL_PRECISION, READ, quantization
from qpcompile.errors import ModelError

# Files that quantizers write next to config.json, and the keys that name the method there.
SIDECARS = {
    "hf_quant_config.json": ("quantization", "quant_algo"),
    "quantize_config.json": ("quant_method",),
    "quant_config.json": ("quant_method",),
}
ADAPTER = "adapter_config.json"
MERGE = (
    "merge it first, with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder); "
    "then give that folder"
)


def refuse_foreign_folder(folder: Path) -> None:
    """Raise ModelError for one of our artifacts, an adapter, another format or quantized weights."""
    if (folder / "manifest.json").is_file() or (folder / "graph").is_dir():
        raise ModelError(
            "this is a compiled model already",
            where=str(folder),
            do=f"load it with qpcompile.load({str(folder)!r}); to compile again, give the model it was made from",
        )
    if (folder / ADAPTER).is_file():
        whole = (folder / "config.json").is_file()
        raise ModelError(
            "an adapter is stored with the model, and it would not be applied"
            if whole
            else "this is an adapter without the model that it changes",
            where=str(folder / ADAPTER),
            do=f"{MERGE}; to compile the model without it, take {ADAPTER} out of the folder" if whole else MERGE,
        )
    if not (folder / "config.json").is_file():
        others = sorted(path.name for path in folder.glob("*.gguf"))
        raise ModelError(
            f"the folder holds GGUF files ({others[0]}), which are not read" if others else "config.json is missing",
            where=str(folder),
            do="give the folder of a transformers checkpoint: config.json, safetensors and the processor's files",
        )
    for name, keys in SIDECARS.items():
        if (folder / name).is_file() and quantization(folder) is None:
            raise _quantized(_method(folder / name, keys), str(folder / name))


def refuse_foreign_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for a configuration of quantized weights, or one that asks for code from a hub.

    where: a folder, or a hub name. Weights in a folder may be of a format that is read.
    """
    for path, value in _settings(config):
        method = value.get("quant_method") if isinstance(value, Mapping) else None
        if path == "quantization_config" and method in READ:
            if not Path(where).is_dir():
                raise ModelError(
                    f"the checkpoint is quantized already ({method}), and is read from a folder only",
                    where=where,
                    do=f"download it: hf download {where} --local-dir FOLDER, and name that",
                )
            continue
        if path.endswith("quantization_config") and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            if (
                method is None
                and isinstance(value, Mapping)
                and (value.get("load_in_4bit") or value.get("load_in_8bit"))
            ):
                method = "bitsandbytes"
            raise _quantized(str(method or "unknown method"), f"{where}, {path} in config.json")
        if path.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise ModelError(
                f"the configuration asks for kernels of a hub, which are never run: {str(value)[:80]}",
                where=f"{where}, {path} in config.json",
                do=f"take {path} out of config.json",
            )


def _settings(config: Mapping[str, Any], at: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a configuration and of nested ones."""
    for key, value in config.items():
        path = f"{at}{key}"
        yield path, value
        if isinstance(value, Mapping) and depth < 4:
            yield from _settings(value, f"{path}.", depth + 1)


def _quantized(method: str, where: str) -> ModelError:
    return ModelError(f"the checkpoint is quantized already ({method})", where=where, do=FULL_PRECISION)


def _method(path: Path, keys: tuple[str, ...]) -> str:
    """The method named in a quantizer's own file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return path.name
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return str(value)[:40] if value else path.name
