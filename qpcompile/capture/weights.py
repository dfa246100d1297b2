"""Validate a model object before capture: a complete transformers model with finite floating-point weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from qpcompile.capture.checkpoint_files import FULL_PRECISION
from qpcompile.errors import ModelError

PASS = "pass the transformers model itself, or the folder or the hub name of one"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Buffers with position and mask tables.
COUNTS = (torch.int64, torch.bool)
FEW = 4


def check_model(model: Any, where: str | None = None) -> Any:
    """Returns the model. Raises ModelError if it is not a model, is quantized, has adapters, or unusable weights."""
    where = where or type(model).__name__
    if hasattr(model, "merge_and_unload"):
        raise ModelError(
            "this is a model with adapters that are not merged", where=where, do="pass model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a {type(model).__name__} is not a transformers model", where=where, do=PASS)
    _refuse_adapters(model, where)
    _refuse_quantized(model, where)
    _refuse_absent(model, where)
    _refuse_not_finite(model, where)
    return model


def _refuse_adapters(model: PreTrainedModel, where: str) -> None:
    found = [name for name, module in model.named_modules() if type(module).__module__.partition(".")[0] == "peft"]
    if found:
        raise ModelError(
            f"{len(found)} layers of the model have adapters that are not merged ({found[0]}, ...)",
            where=where,
            do="load the base with PeftModel.from_pretrained and pass its merge_and_unload()",
        )


def _refuse_quantized(model: PreTrainedModel, where: str) -> None:
    """Refuse quantized models, by the weights themselves or the mark of transformers' quantizers."""
    mark = getattr(model.config, "quantization_config", None)
    if getattr(model, "hf_quantizer", None) is not None or mark is not None:
        kind = mark.get("quant_method") if isinstance(mark, dict) else getattr(mark, "quant_method", None)
        method = getattr(kind, "value", kind) or "unknown method"
        raise ModelError(f"the model is quantized already ({method})", where=where, do=FULL_PRECISION)
    for name, kind in _codes(model):
        raise ModelError(f"the model is quantized already: {name} is of {kind}", where=where, do=FULL_PRECISION)


def _codes(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """(name, kind) of tensors that quantizers substitute for weights.

    They store codes as integers, as 8-bit floats, as tensor subclasses, or as buffers.
    """
    for name, tensor in model.named_parameters():
        if type(tensor) is not torch.nn.Parameter:
            yield name, type(tensor).__name__
        elif tensor.dtype not in FLOATS:
            yield name, str(tensor.dtype).removeprefix("torch.")
    for name, tensor in model.named_buffers():
        if tensor.ndim > 1 and tensor.dtype not in COUNTS and tensor.dtype not in FLOATS:
            yield name, str(tensor.dtype).removeprefix("torch.")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn."):
            yield name, type(module).__name__


def _refuse_absent(model: PreTrainedModel, where: str) -> None:
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if absent:
        raise ModelError(
            f"{len(absent)} tensors of the model are not in memory ({absent[0]}, ...)",
            where=where,
            do="load it without offloading to disk or to the meta device",
        )


def _refuse_not_finite(model: PreTrainedModel, where: str) -> None:
    found = list(_not_finite(model))
    if found:
        more = ", ..." if len(found) > FEW else ""
        raise ModelError(
            f"{len(found)} tensors of the model hold NaN or infinite numbers: {', '.join(found[:FEW])}{more}",
            where=where,
            do="use a checkpoint whose weights are finite; float16 overflows above 65504, bfloat16 does not",
        )


def _not_finite(model: PreTrainedModel) -> Iterator[str]:
    """Names of parameters with non-finite values. Minimum and maximum propagate NaN, and need no memory."""
    for name, tensor in model.named_parameters():
        if tensor.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(tensor.detach())):
            yield name
