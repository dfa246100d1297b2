"""Tiny random models of every image-text-to-text family of the installed transformers, with prompts for each."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from corrections import corrections
from family import Family
from pictures import Inputs, Pictures
from shape import Shape
from shrink import shrunk
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

Cases = dict[str, Inputs]
PICTURES = {"pixel_values", "flattened_patches", "image_patches", "protein_input_ids"}
TYPES = ("mm_token_type_ids", "token_type_ids")


def names() -> list[str]:
    """The families that transformers lists, by model type."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def build(name: str, shape: Shape | None = None) -> tuple[PreTrainedModel, Cases]:
    """A seeded tiny model of a family and its prompts by name; the first, `one`, is for tracing."""
    shape = shape or Shape()
    family = corrections(shape).get(name, Family())
    if missing := [package for package in family.needs if find_spec(package) is None]:
        raise ImportError(f"the tower needs the package {', '.join(missing)}, which is not installed")
    config = shrunk(CONFIG_MAPPING[name], family.changes, shape)
    model = random_model(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name], config, shape)
    return model, _cases(model, family.pictures(config), family, shape)


def random_model(class_name: str, config: Any, shape: Shape) -> PreTrainedModel:
    """A model in eval mode; weights so large that answers depend on the prompt."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1 or not bool(parameter.any()):
            width = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.data.normal_(0.0, width, generator=generator)
    model.generation_config.pad_token_id = shape.pad
    model.generation_config.eos_token_id = None
    model.generation_config.decoder_start_token_id = model.generation_config.decoder_start_token_id or shape.begin
    return model.requires_grad_(False)


def _cases(model: PreTrainedModel, pictures: Pictures, family: Family, shape: Shape) -> Cases:
    """Prompts of several shapes: one row, a longer row, two rows of which one is padded, two pictures, no picture."""
    takes = inspect.signature(type(model).forward).parameters
    types = next((name for name in TYPES if name in takes), None) if family.types == "auto" else family.types

    def tokens(number: int) -> list[int]:
        count = family.tokens if family.tokens is not None else _visual_tokens(model, pictures([number]))
        return [*family.around[0], *[shape.image] * count, *family.around[1]]

    def case(rows: list[list[int]], numbers: list[int]) -> Inputs:
        width = max(map(len, rows))
        ids = torch.tensor([[shape.pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs: Inputs = {"input_ids": ids, "attention_mask": mask}
        if types is not None:
            inputs[types] = (ids == shape.image).long()
        inputs |= pictures(numbers) if numbers and takes.keys() & PICTURES else {}
        inputs |= family.beside(inputs) if numbers else {}
        return {key: value for key, value in inputs.items() if value is not None}

    begin = [shape.begin] if shape.words[0] else []

    def words(place: int) -> list[int]:
        generator = torch.Generator().manual_seed(place)
        return torch.randint(*shape.text, (shape.words[place],), generator=generator).tolist()

    first, second = tokens(0), tokens(1)
    cases = {
        "one": case([[*begin, *words(0), *first, *words(1)]], [0]),
        "longer": case([[*begin, *words(2), *second, *words(3)]], [1]),
        "padded": case([[*begin, *words(4), *first, *words(5)], [*begin, *words(6), *second, *words(7)]], [0, 1]),
        "pictures": case([[*begin, *words(8), *first, *words(9), *second, *words(10)]], [0, 1]),
    }
    if not family.several:
        del cases["pictures"]
    return cases | ({"text": case([[*begin, *words(11)]], [])} if family.text else {})


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
