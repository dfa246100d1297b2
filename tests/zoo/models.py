"""Tiny random models of every image-text-to-text family of the installed transformers, with prompts for each."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from corrections import CORRECTIONS
from family import Family
from pictures import Inputs, Pictures
from shrink import BEGIN, IMAGE, PAD, shrunk
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

Cases = dict[str, Inputs]
PICTURES = {"pixel_values", "flattened_patches", "image_patches", "protein_input_ids"}
TYPES = ("mm_token_type_ids", "token_type_ids")


def names() -> list[str]:
    """The families that transformers lists, by model type."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def build(name: str) -> tuple[PreTrainedModel, Cases]:
    """A seeded tiny model of a family and its prompts by name; the first, `one`, is for tracing."""
    family = CORRECTIONS.get(name, Family())
    if missing := [package for package in family.needs if find_spec(package) is None]:
        raise ImportError(f"the tower needs the package {', '.join(missing)}, which is not installed")
    config = shrunk(CONFIG_MAPPING[name], family.changes)
    model = random_model(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name], config)
    return model, _cases(model, family.pictures(config), family)


def random_model(class_name: str, config: Any) -> PreTrainedModel:
    """A model in eval mode; weights so large that answers depend on the prompt."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1 or not bool(parameter.any()):
            width = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.data.normal_(0.0, width, generator=generator)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.decoder_start_token_id = model.generation_config.decoder_start_token_id or BEGIN
    return model.requires_grad_(False)


def _cases(model: PreTrainedModel, pictures: Pictures, family: Family) -> Cases:
    """Prompts of several shapes: one row, a longer row, two rows of which one is padded, two pictures, no picture."""
    takes = inspect.signature(type(model).forward).parameters
    types = next((name for name in TYPES if name in takes), None) if family.types == "auto" else family.types

    def tokens(number: int) -> list[int]:
        count = family.tokens if family.tokens is not None else _visual_tokens(model, pictures([number]))
        return [*family.around[0], *[IMAGE] * count, *family.around[1]]

    def case(rows: list[list[int]], numbers: list[int]) -> Inputs:
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs: Inputs = {"input_ids": ids, "attention_mask": mask}
        if types is not None:
            inputs[types] = (ids == IMAGE).long()
        inputs |= pictures(numbers) if numbers and takes.keys() & PICTURES else {}
        inputs |= family.beside(inputs) if numbers else {}
        return {key: value for key, value in inputs.items() if value is not None}

    first, second = tokens(0), tokens(1)
    cases = {
        "one": case([[BEGIN, *_ids(4, 0), *first, *_ids(7, 1)]], [0]),
        "longer": case([[BEGIN, *_ids(9, 2), *second, *_ids(21, 3)]], [1]),
        "padded": case([[BEGIN, *_ids(2, 4), *first, *_ids(4, 5)], [BEGIN, *_ids(5, 6), *second, *_ids(8, 7)]], [0, 1]),
        "pictures": case([[BEGIN, *_ids(3, 8), *first, *_ids(2, 9), *second, *_ids(6, 10)]], [0, 1]),
    }
    if not family.several:
        del cases["pictures"]
    return cases | ({"text": case([[BEGIN, *_ids(19, 11)]], [])} if family.text else {})


def _ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 80, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _visual_tokens(model: Any, inputs: Inputs) -> int:
    """How many rows of features the model itself makes of pictures."""
    owner = model if hasattr(model, "get_image_features") else model.base_model
    takes = inspect.signature(owner.get_image_features).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    given = {key: value for key, value in inputs.items() if key in takes or open_ended}
    with torch.no_grad():
        features: Any = owner.get_image_features(**given)
    rows = getattr(features, "pooler_output", features)
    rows = getattr(features, "last_hidden_state", None) if rows is None else rows
    rows = features.deepstack_features[0][1] if rows is None else rows
    parts = [rows] if isinstance(rows, torch.Tensor) else rows
    return sum(part.numel() // part.shape[-1] for part in parts)
