"""Validate the files of a checkpoint folder before transformers reads them; errors name the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qpcompile.errors import ModelError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Files that transformers reads besides the weights.
SETTINGS = (
    CONFIG,
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tokenizer.model",
)
FLOATS = {"F64", "F32", "F16", "BF16"}
WHOLE_NUMBERS = {"I64", "I32", "I16", "BOOL"}
POINTER = b"version https://git-lfs"
AGAIN = "download or copy the file again"
FULL_PRECISION = "give the full-precision checkpoint that it was made from: the compile quantizes it itself"


# Formats of quantized weights that are read (quantized.py).
READ = ("compressed-tensors", "gptq")


def quantization(folder: Path) -> Mapping[str, Any] | None:
    """The `quantization_config` of a folder's config.json, if its weights are of a format that is read."""
    path = folder / CONFIG
    data = _read_json(path) if path.is_file() else {}
    settings = data.get("quantization_config") if isinstance(data, dict) else None
    return settings if isinstance(settings, dict) and settings.get("quant_method") in READ else None


def refuse_damaged(folder: Path) -> None:
    """Raise ModelError naming the first file of a checkpoint that is missing, empty, damaged or quantized."""
    try:
        for name in SETTINGS:
            if _there(folder / name):
                _check_file(folder / name)
        for path in weight_files(folder):
            _check_file(path)
        _refuse_other_places(folder)
    except OSError as error:
        where = str(error.filename or folder)
        raise ModelError(
            f"a file of the model cannot be read: {error.strerror or error}", where=where, do="check its permissions"
        ) from error


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would read, in its order of preference."""
    if _there(folder / SINGLE):
        return [folder / SINGLE]
    if _there(folder / INDEX):
        _check_file(folder / INDEX)
        return _shards(folder / INDEX)
    return [folder / name for name in PICKLED if _there(folder / name)]


def _check_file(path: Path) -> None:
    """Refuse a file whose content cannot match its name."""
    if not path.is_file():
        raise ModelError(f"{path.name} is not a file, or a link that leads nowhere", where=str(path), do=AGAIN)
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if not start:
        raise ModelError(f"{path.name} is empty", where=str(path), do=AGAIN)
    if start == POINTER:
        raise ModelError(
            f"{path.name} is a pointer of git-lfs, not the file itself",
            where=str(path),
            do="run `git lfs pull` in the folder, or download the file",
        )
    if path.suffix == ".safetensors":
        _check_safetensors(path, FLOATS | WHOLE_NUMBERS | ({"I8"} if quantization(path.parent) else set()))
    elif path.suffix == ".json" and not isinstance(_read_json(path), dict):
        raise ModelError(f"{path.name} holds no JSON object", where=str(path), do=AGAIN)


def _refuse_other_places(folder: Path) -> None:
    """Refuse settings that make transformers open files outside the folder."""
    for name in ("tokenizer_config.json", "processor_config.json"):
        data = _read_json(folder / name) if _there(folder / name) else {}
        if not isinstance(data, dict):
            continue
        listed = data.get("fast_tokenizer_files")
        for each in listed if isinstance(listed, list) else [listed]:
            if each is not None and (not isinstance(each, str) or Path(each).name != each):
                raise ModelError(
                    f"fast_tokenizer_files names {each!r:.80}, which is outside the folder",
                    where=str(folder / name),
                    do="use file names only",
                )
        if data.get("audio_tokenizer") is not None:
            raise ModelError(
                "audio_tokenizer names another model, and answers about pictures need none",
                where=str(folder / name),
                do="take the setting out",
            )


def _check_safetensors(path: Path, allowed: set[str]) -> None:
    """Refuse a file whose header does not match its size, and quantized codes that would be taken for weights.

    transformers casts any stored type to the model's: integers or 8-bit floats without their scales become wrong
    weights. The tensors themselves are not read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{path.name} is damaged or cut short: {error}", where=str(path), do=AGAIN) from error
    for name, kind in kinds.items():
        if kind not in allowed or (kind in WHOLE_NUMBERS and name.endswith(".weight")):
            raise ModelError(
                f"the checkpoint is quantized already: {name} is of {kind}", where=str(path), do=FULL_PRECISION
            )


def _shards(index: Path) -> list[Path]:
    """The files listed in an index, which must be in the same folder."""
    content = _read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) and "metadata" in content else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index.name} has no metadata or no table of files (weight_map)", where=str(index), do=AGAIN)
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelError(
                f"{index.name} names {name!r}, which is outside the folder",
                where=str(index),
                do="use file names only",
            )
        if not _there(index.parent / name):
            raise ModelError(f"{name} is missing: {index.name} names it", where=str(index), do=AGAIN)
    return [index.parent / name for name in names]


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path), do=AGAIN) from error
