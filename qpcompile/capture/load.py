"""Load a transformers model and its processor, complete and in full precision, or refuse it.

transformers initializes missing tensors randomly and drops unexpected ones, with a log message only. Here both are
errors naming the tensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers import __version__ as transformers_version
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from qpcompile.capture.checkpoint_files import quantization, refuse_damaged
from qpcompile.capture.config_sizes import refuse_counts, refuse_larger, tensor_shapes
from qpcompile.capture.foreign import MERGE, refuse_foreign_config, refuse_foreign_folder
from qpcompile.capture.mapped_weights import can_map, mapped_model
from qpcompile.capture.quantized import load_dequantized
from qpcompile.capture.weights import check_model
from qpcompile.errors import ModelError

Source = str | PathLike[str]
_LOG = logging.getLogger("qpcompile")

NAMED = 4
LONGEST = 300
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# What a processor is saved as, or its tokenizer.
PROCESSOR_FILES = ("*processor*", "*token*", "vocab*", "merges*", "chat_template*", "*.tiktoken", "*.spm")
WHOLE = "give the folder or the hub name of a whole model that transformers.AutoModelForImageTextToText loads"


def load_model(source: Source, processor: Any = None, inputs: bool = False) -> tuple[PreTrainedModel, Any]:
    """Load model and processor from a folder or hub name; code from either is never run.

    The weights of a folder with safetensors stay in its files (mapped_weights.py).

    processor: used instead of the folder's own. inputs: whether the caller has inputs of the model, so that a folder
    without any file of a processor is loaded without one.

    Raises ModelError for anything that does not load completely: missing or damaged files, missing or unexpected
    tensors, non-finite weights, quantized weights of a format that quantized.py does not read, adapters.
    """
    config = read_config(source)
    auto: Any = AutoModelForImageTextToText
    try:
        if Path(source).is_dir() and quantization(Path(source)) is not None:
            model, found = load_dequantized(Path(source), config)
            _refuse_other_tensors(source, found)
            return check_model(model.eval(), str(source)), _processor(source, processor, inputs)
        if Path(source).is_dir():
            refuse_larger(config, tensor_shapes(Path(source)), str(source))
        if Path(source).is_dir() and can_map(Path(source), config):
            model, found = mapped_model(Path(source), config, _get_model_class(config, auto._model_mapping))
        else:
            _LOG.info("weights: transformers loads %s, which is no folder with all of them in safetensors", source)
            model, found = auto.from_pretrained(
                source, config=config, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except ModelError:
        raise
    except Exception as error:
        _refuse_damaged_snapshot(source)
        raise _does_not_load(source, error) from error
    _refuse_damaged_snapshot(source)
    _refuse_other_tensors(source, found)
    return check_model(model.eval(), str(source)), _processor(source, processor, inputs)


def _processor(source: Source, given: Any, inputs: bool) -> Any:
    if given is not None:
        return given
    if inputs and Path(source).is_dir() and not any(next(Path(source).glob(name), None) for name in PROCESSOR_FILES):
        _LOG.warning(
            "%s has no processor: the compiled model takes inputs as the samples are, and no questions", source
        )
        return None
    return load_processor(source)


def read_config(source: Source) -> Any:
    """The configuration of a model. Raises ModelError for problems detectable before weights are read."""
    _refuse_no_folder(source)
    if Path(source).is_dir():
        refuse_foreign_folder(Path(source))
        refuse_damaged(Path(source))
    elif find_adapter_config_file(str(source)) is not None:
        raise ModelError(f"{source} is an adapter, or has one that would not be applied", where=str(source), do=MERGE)
    raw: Mapping[str, Any] = {}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source)
        refuse_foreign_config(raw, str(source))
        if Path(source).is_dir():
            refuse_counts(raw, tensor_shapes(Path(source)), str(source))
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise ValueError(f"a model of type {config.model_type!r} does not answer questions about pictures")
    except ModelError:
        raise
    except Exception as error:
        raise _no_config(source, raw, error) from error
    return config


def load_processor(source: Source) -> Any:
    """Load the processor. Raises ModelError if its files are missing or damaged."""
    do = "add preprocessor_config.json, processor_config.json and the tokenizer's files, or pass processor=..."
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"the processor of {source} does not load: {told(error)}", where=str(source), do=do) from error
    # If files are missing, transformers falls back to a tokenizer, which silently drops pictures.
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(
            f"{source} has no processor for pictures and text, only a {type(processor).__name__}",
            where=str(source),
            do=do,
        )
    return processor


def told(error: BaseException) -> str:
    """The first sentence of an exception's message, shortened; its class if the message is uninformative."""
    lines = [_plain(line) for line in str(error).strip().splitlines()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = text.partition(". ")[0]
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return _short(text)


def _plain(text: str) -> str:
    """The text without terminal colour codes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip()


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def named(names: Iterable[str]) -> str:
    """`3 (a, b, c)`: the count, and the first few in order."""
    ordered = sorted(names)
    more = ", ..." if len(ordered) > NAMED else ""
    return f"{len(ordered)} ({', '.join(ordered[:NAMED])}{more})"


def _refuse_other_tensors(source: Source, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose tensors do not match the model, by transformers' loading report.

    The report excludes tied weights and tensors that each class declares harmless, such as buffers of older versions.
    """
    shapes = [
        f"{name}: {list(held)} in the file, {list(own)} in the model" for name, held, own in found["mismatched_keys"]
    ]
    parts = [
        (found["missing_keys"], "tensors of the model are missing"),
        (found["unexpected_keys"], "tensors have no place in the model"),
        (shapes, "tensors have another shape"),
        (found["error_msgs"], "tensors could not be read"),
    ]
    wrong = [f"{what}: {named(names)}" for names, what in parts if names]
    if not wrong:
        return
    raise ModelError(
        f"the checkpoint does not hold this model: {'; '.join(wrong)}",
        where=str(source),
        do="save or download the whole checkpoint with the config.json that belongs to it. If only tensors without a "
        "place are named and none of them matters, load the model with transformers and pass the model itself",
    )


def _refuse_no_folder(source: Source) -> None:
    """Refuse sources that are neither a folder nor a hub name."""
    name = _short(str(source))
    try:
        if Path(source).is_dir():
            return
        there = Path(source).exists()
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {error.strerror}", where=name, do=WHOLE) from error
    if there:
        raise ModelError(f"{name} is a file, not a model's folder", where=name, do=WHOLE)
    if not isinstance(source, str) or not HUB_NAME.fullmatch(source):
        raise ModelError(f"there is no folder {name}", where=name, do=WHOLE)


def _no_config(source: Source, raw: Mapping[str, Any], error: Exception) -> ModelError:
    """The error for an unusable configuration."""
    kind, saved = raw.get("model_type"), raw.get("transformers_version")
    if raw and isinstance(error, ValueError) and "auto_map" in raw and "custom code" in str(error):
        return ModelError(
            f"{source} needs code of its own (auto_map in config.json), and code that comes with a checkpoint is never "
            f"run; transformers {transformers_version} has no class for model type {kind!r}",
            where=str(source),
            do="take a checkpoint of a class that transformers has",
        )
    if raw and isinstance(error, ValueError) and "does not recognize" in str(error):
        by = f", and the checkpoint was saved by {saved}" if saved else ""
        return ModelError(
            f"{source} is of model type {kind!r}, which transformers {transformers_version} does not know{by}",
            where=str(source),
            do=f"install a version of transformers that has it; {WHOLE}",
        )
    if not kind and Path(source).is_dir():
        return ModelError("config.json names no model_type", where=str(source), do=WHOLE)
    if not raw and not Path(source).is_dir():
        return ModelError(
            f"no folder here is named {source}, and the hub gave no configuration for that name: {told(error)}",
            where=str(source),
            do="check the name; without a network, name a folder, or a model that the hub's cache holds",
        )
    return _does_not_load(source, error)


def _does_not_load(source: Source, error: Exception) -> ModelError:
    if isinstance(error, UnpicklingError):
        return ModelError(
            f"the weights of {source} are a pickle with more than tensors in it, which is never run",
            where=str(source),
            do="take the safetensors form of the checkpoint",
        )
    return ModelError(
        f"{source} does not load as an image-text-to-text model: {told(error)}", where=str(source), do=WHOLE
    )


def _refuse_damaged_snapshot(source: Source) -> None:
    """The same checks on the files of a hub snapshot, which exist only after loading."""
    if Path(source).is_dir():
        return
    config = cached_file(str(source), "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    if config is not None:
        refuse_damaged(Path(config).parent)
