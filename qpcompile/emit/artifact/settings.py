"""Validate settings that transformers reads: config, generation settings, processor and tokenizer files.

transformers trusts them: some name a file, a hub repository or a class, others control allocation sizes. Anything that
a compile never writes is refused here, before transformers reads it. Checkpoints may contain such settings (the origin
of a component, code with the weights): a compile omits them, as an artifact does not need them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from qpcompile.emit.artifact import names
from qpcompile.emit.artifact.folder import AGAIN, read_json
from qpcompile.emit.artifact.json_text import MOST_BYTES
from qpcompile.errors import ArtifactError, ExportError

CONFIG, GENERATION = "config.json", "generation_config.json"
INDEX = "model.safetensors.index.json"
# A quantization method that transformers refuses and quotes in the error, whichever class loads the folder.
MARKED = "quantization_config"
MARK = {
    "quant_method": "quanto",
    "weights": "a model compiled by qpcompile: load this folder with qpcompile.load(folder)",
}
# The type that transformers knows such a folder by after `qpcompile.register_with_transformers`, and none before; the
# model's own type is kept beside it.
MODEL_TYPE, OWN_TYPE = "qpcompile", "compiled_model_type"
_FLOATS = ("Infinity", "-Infinity", "NaN")
_CONFIGS = (CONFIG, GENERATION)
# JSON files other than settings.
_TABLES = frozenset({INDEX, "manifest.json", "tokenizer.json", "vocab.json", "added_tokens.json"})
# Settings that lead to code, a file or a repository.
_LEADS = re.compile(
    r"auto_map|audio_tokenizer|quantization_config|custom_\w+|trust_remote_code|\w*name_or_path|gguf_file|use_pretrained\w*"
    r"|_?(attn|experts)_implementation\w*|use_kernels|kernel_config|adapter\w*|peft_config|assistant_model|vocab_file"
    r"|tokenizer_file|merges_file|spm_file|\w+_(file|path|dir|folder|url|repo|repo_id)",
    re.ASCII,
)
# Parts of a model that are called so: a nested configuration, whose settings are checked one by one; and their sizes.
# Elsewhere a number leads too: 1 trusts code as True does, and as the name of a file it is an open one.
_PART, _PART_SIZE = "adapter_config", re.compile(r"adapter\w*", re.ASCII)
# The only settings whose text may contain slashes, like paths and URLs: tokens, templates, numbered labels; and tags.
_FREE = re.compile(r"(chat_)?template|content|stop_strings|\d+|\w*(token|prompt|prefix|suffix|format)s?", re.ASCII)
# So may a ratio of two numbers, where a setting is called one.
_RATE, _RATIO = re.compile(r"\w*(rate|ratio)", re.ASCII), re.compile(r"\d{1,4}/\d{1,4}", re.ASCII)
_SLASH, _TAG = re.compile(r"[/\\\\]"), re.compile(r"</?[^<>/\\\\]*>")
# Settings that name a class, and its required base class.
_CLASSES = {
    "tokenizer_class": transformers.PreTrainedTokenizerBase,
    "processor_class": transformers.ProcessorMixin,
    "image_processor_type": object,
    "video_processor_type": object,
    "feature_extractor_type": object,
}
# Settings that count modules or repetitions, with generous upper limits.
_COUNTS = re.compile(r"\w*(layers?|blocks?|depths?|experts?|heads?|stages?|num_beams|num_beam_groups)", re.ASCII)
_SEQUENCES = re.compile(r"num_return_sequences|num_(assistant|additional_image)_tokens|\w*num_frames", re.ASCII)
MOST_COUNTED, MOST_SEQUENCES, MOST_NUMBER = 2048, 4096, 2**31
MOST_TEXT = 100_000


def write_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write config.json, marked so that plain transformers refuses the folder instead of using random weights.

    Auto classes refuse the type of the model, and the model's class refuses the quantization method.
    """
    for part in _parts(config):
        setattr(part, MARKED, dict(MARK))
    config.save_pretrained(folder)
    data = read_json(folder / CONFIG)
    data |= {"model_type": MODEL_TYPE, OWN_TYPE: data["model_type"]}
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8", newline="\n")


def leave_out_leads(folder: Path) -> None:
    """Rewrite just-saved settings without those that refer to code or to another file.

    Settings that a processor may need are kept, to be refused: its audio tokenizer, and other texts with slashes.
    """
    for path in folder.glob("*.json"):
        if path.name in _TABLES:
            continue
        data = read_json(path)
        kept = _without_leads(data, _leads if path.name == CONFIG else _leads_by_name)
        if kept != data:
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def read_config(model_class: Any, folder: Path) -> PreTrainedConfig:
    """Read the configuration in config.json without marks, which artifacts of earlier versions lack.

    model_class: transformers' class of the host; several model types may share one.
    """
    config_class: type[PreTrainedConfig] = model_class.config_class
    data = read_json(folder / CONFIG)
    if not isinstance(data, dict):
        raise _refused("config.json is not a mapping", CONFIG)
    data = _with_floats(_unmarked(data))
    kind = data.pop(OWN_TYPE) if OWN_TYPE in data else data.get("model_type")
    data["model_type"] = kind
    if isinstance(kind, str) and MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) == model_class.__name__:
        config_class = CONFIG_MAPPING[kind]
    if kind != config_class.model_type:
        raise _refused(f"the model type is {kind!r:.80}, not {config_class.model_type}", CONFIG)
    return config_class.from_dict(data)


def check_settings(folder: Path, files: list[str]) -> None:
    """Refuse settings that a compile does not write. Raises ArtifactError naming the file and the setting."""
    for path in files:
        name = path.rsplit("/", 1)[-1]
        size = (folder / path).stat().st_size
        if size > MOST_BYTES and not name.endswith(".safetensors"):
            raise _refused(f"the file has {size} bytes; at most {MOST_BYTES} are read", path)
        if not path.endswith(".json") or name in _TABLES or path.startswith("graph/"):
            continue
        data = read_json(folder / path)
        if not isinstance(data, dict):
            raise _refused("settings are a mapping of names to values", path)
        if path == CONFIG:
            data = _unmarked(data)
        for key, value in _settings(data):
            if problem := _problem(key, value):
                raise _refused(problem, path)


def class_of(name: Any, base: type, error: type[ArtifactError] | type[ExportError], where: str) -> Any:
    """The class of this name in transformers, derived from `base`; never code that came with a model."""
    found = getattr(transformers, name, None) if names.is_class(name) and not name.startswith("_") else None
    if not (isinstance(found, type) and issubclass(found, base)):
        kind = "model class" if base is transformers.PreTrainedModel else "class"
        raise error(
            f"transformers {transformers.__version__} has no {kind} {name!s:.80}",
            where=where,
            do="use a model family that is part of transformers, and the version the model was saved with",
        )
    return found


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and its nested ones."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _unmarked(data: dict[str, Any]) -> dict[str, Any]:
    """Settings without our own mark, at every level."""
    kept = {key: value for key, value in data.items() if key != MARKED or value != MARK}
    return {key: _unmarked(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _with_floats(value: Any) -> Any:
    """Settings with the numbers that JSON lacks, as transformers writes them: `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
        return float(value["__float__"])
    return {key: _with_floats(item) for key, item in value.items()}


def _without_leads(value: Any, leads: Callable[[str, Any], bool]) -> Any:
    """Settings without those that refer to code or to another file, at every level."""
    if isinstance(value, list):
        return [_without_leads(item, leads) for item in value]
    if not isinstance(value, dict):
        return value
    as_it_is = (MARKED, "audio_tokenizer")
    return {
        key: item if key in as_it_is else _without_leads(item, leads)
        for key, item in value.items()
        if key in as_it_is or not leads(key, item)
    }


def _leads(key: str, value: Any) -> bool:
    """Whether a setting may refer to code, a file or a repository: by its name, or by text with slashes."""
    if _LEADS.fullmatch(key):
        return _leads_by_name(key, value)
    texts = value if isinstance(value, list) else [value]
    if _RATE.fullmatch(key):
        texts = [text for text in texts if not isinstance(text, str) or not _RATIO.fullmatch(text)]
    return not _FREE.fullmatch(key) and any(
        isinstance(text, str) and _SLASH.search(_TAG.sub("", text)) for text in texts
    )


def _leads_by_name(key: str, value: Any) -> bool:
    is_part = key == _PART and isinstance(value, dict)
    is_size = _PART_SIZE.fullmatch(key) and isinstance(value, (int, float)) and not isinstance(value, bool)
    return not (is_part or is_size or value is None or value is False) and _LEADS.fullmatch(key) is not None


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its name, including nested ones."""
    yield key, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _settings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _settings(item, key)


def _problem(key: str, value: Any) -> str:
    """What is wrong with one setting; "" for nothing."""
    given = f"the setting {key[:80]!r} is {value!r:.80}"
    if _leads(key, value):
        return f"{given}; an artifact has no setting that leads to code or to another file"
    if key in _CLASSES and value is not None:
        class_of(value, _CLASSES[key], ArtifactError, key)
    if key == "dtype" and value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
        return f"{given}, which is not a type of numbers"
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return f"the setting {key[:80]!r} is a text of {len(value)} characters; {MOST_TEXT} are read"
    if isinstance(value, int):
        most = MOST_COUNTED if _COUNTS.fullmatch(key) else MOST_SEQUENCES if _SEQUENCES.fullmatch(key) else MOST_NUMBER
        # `model_max_length` is 1e30 where a tokenizer knows none.
        if abs(value) > most and key != "model_max_length":
            return f"{given}; at most {most} is read"
    return ""


def _refused(what: str, path: str) -> ArtifactError:
    return ArtifactError(what, where=path, do=AGAIN)
