"""Tiny random models of many vision-language families, with prompts of several shapes for each.

A prompt is built from ids and pixels directly: no processor, no tokenizer, nothing to download. The number of
placeholder tokens of a picture is what the model's own `get_image_features` returns for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

# Ids of the shared tiny vocabulary; text is 3..79.
VOCABULARY, BEGIN, END, PAD, IMAGE, VIDEO, VISION_START, VISION_END = 99, 1, 2, 0, 90, 91, 92, 93
LAYERS = 3

Inputs = dict[str, torch.Tensor]
Cases = dict[str, Inputs]
Pictures = Callable[[Sequence[int]], Inputs]


def _text(**changes: Any) -> dict[str, Any]:
    """Sizes shared by the decoders: 4 query heads on 2 key-value heads, a width that is not a power of two."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "initializer_range": 0.3,
    }
    return sizes | changes


def _tower(model_type: str, **changes: Any) -> dict[str, Any]:
    """Sizes shared by the vision towers: 32 x 32 pixels in 4 x 4 patches."""
    sizes = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return sizes | changes


def _build(name: str, **settings: Any) -> PreTrainedModel:
    """A seeded model of class `{name}ForConditionalGeneration`; weights so large that answers depend on the prompt."""
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1 or not bool(parameter.any()):
            width = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.data.normal_(0.0, width, generator=generator)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def _noise(picture: int, *shape: int) -> torch.Tensor:
    """The pixels of picture number `picture`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + picture))


def _ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 80, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _left_padded(rows: Sequence[Sequence[int]]) -> Inputs:
    """Rows of ids as one tensor, padded on the left, and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _cases(
    model: PreTrainedModel, pictures: Pictures, types: str | None = None, around: tuple[list[int], list[int]] = ([], [])
) -> Cases:
    """Prompts of several shapes: one row (to trace with), a longer row, two rows of which one is padded, two pictures.

    `pictures(numbers)` gives the pixel inputs of the pictures of those numbers; even and odd ones may differ in size.
    """

    def tokens(number: int) -> list[int]:
        features: Any = model.get_image_features(**pictures([number]))  # type: ignore[operator]
        parts = features.pooler_output
        parts = [parts] if isinstance(parts, torch.Tensor) else parts
        count = sum(part.numel() // part.shape[-1] for part in parts)
        return [*around[0], *[IMAGE] * count, *around[1]]

    def case(rows: Sequence[Sequence[int]], numbers: Sequence[int]) -> Inputs:
        inputs = _left_padded(rows)
        if types is not None:
            inputs[types] = (inputs["input_ids"] == IMAGE).long()
        return inputs | pictures(numbers)

    with torch.no_grad():
        first, second = tokens(0), tokens(1)
    return {
        "one": case([[BEGIN, *_ids(4, 0), *first, *_ids(7, 1)]], [0]),
        "longer": case([[BEGIN, *_ids(9, 2), *second, *_ids(21, 3)]], [1]),
        "padded": case([[BEGIN, *_ids(2, 4), *first, *_ids(4, 5)], [BEGIN, *_ids(5, 6), *second, *_ids(8, 7)]], [0, 1]),
        "pictures": case([[BEGIN, *_ids(3, 8), *first, *_ids(2, 9), *second, *_ids(6, 10)]], [0, 1]),
    }


def _stacked(numbers: Sequence[int]) -> Inputs:
    """One square of pixels per picture."""
    return {"pixel_values": torch.stack([_noise(number, 3, 32, 32) for number in numbers])}


def llava(**text: Any) -> tuple[PreTrainedModel, Cases]:
    """CLIP tower, LLaMA decoder (`text` changes its sizes), a fixed number of visual tokens."""
    model = _build(
        "Llava",
        vision_config=_tower("clip_vision_model", projection_dim=32),
        text_config=_text(model_type="llama", **text),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return model, _cases(model, _stacked)


def _tiles(most: int) -> Pictures:
    """Any-resolution pictures: an overview and tiles; the first is wide (3 views), the second tall (3) and cropped."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        pixels = torch.zeros(len(numbers), most, 3, 32, 32)
        for row, number in enumerate(numbers):
            pixels[row, :3] = _noise(number, 3, 3, 32, 32)
        sizes = [(26, 60) if number % 2 == 0 else (64, 20) for number in numbers]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    return pictures


def llava_next() -> tuple[PreTrainedModel, Cases]:
    """Tiles of any-resolution pictures, padding removed, a learned separator after every row of patches."""
    model = _build(
        "LlavaNext",
        vision_config=_tower("clip_vision_model", projection_dim=32),
        text_config=_text(model_type="llama"),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        image_seq_length=16,
    )
    return model, _cases(model, _tiles(3))


def llava_onevision() -> tuple[PreTrainedModel, Cases]:
    """SigLIP tower, Qwen2 decoder, tiles shrunk to a budget."""
    model = _build(
        "LlavaOnevision",
        vision_config=_tower("siglip_vision_model", vision_use_head=False),
        text_config=_text(model_type="qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    return model, _cases(model, _tiles(3))


def _packed(patch: int, temporal: int = 2) -> Pictures:
    """Qwen's packed patches: 6 x 4 in even pictures, 10 x 6 in odd ones; neither fills its attention windows."""

    def pictures(numbers: Sequence[int]) -> Inputs:
        grids = [(1, 6, 4) if number % 2 == 0 else (1, 10, 6) for number in numbers]
        rows = [_noise(n, h * w, 3 * temporal * patch * patch) for n, (_, h, w) in zip(numbers, grids, strict=True)]
        return {"pixel_values": torch.cat(rows), "image_grid_thw": torch.tensor(grids)}

    return pictures


def _qwen(name: str, tower: dict[str, Any], text: dict[str, Any], patch: int) -> tuple[PreTrainedModel, Cases]:
    model = _build(
        name,
        vision_config=tower,
        text_config=_text(**text),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return model, _cases(model, _packed(patch), "mm_token_type_ids", ([VISION_START], [VISION_END]))


# Three sections of rotary frequencies (time, height, width): 2 + 2 + 2 of the 6 of a head of 12.
M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}


# Decoder settings of these families for heads of 16.
WIDE_QWEN = {"hidden_size": 64, "rope_parameters": M_ROPE | {"mrope_section": [2, 3, 3]}}


def qwen2_vl(**text: Any) -> tuple[PreTrainedModel, Cases]:
    """Packed pictures of any size, M-RoPE; `text` changes the decoder's sizes."""
    text = {"hidden_size": 48, "rope_parameters": M_ROPE} | text
    tower = {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
    return _qwen("Qwen2VL", tower | {"hidden_size": text["hidden_size"]}, text, 4)


def qwen2_5_vl(**text: Any) -> tuple[PreTrainedModel, Cases]:
    """Windowed vision attention: windows of 4 x 4 patches, which 6 x 4 and 10 x 6 do not fill."""
    text = {"hidden_size": 48, "rope_parameters": M_ROPE} | text
    tower = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1],
    }
    return _qwen("Qwen2_5_VL", tower, text, 4)


def qwen3_vl() -> tuple[PreTrainedModel, Cases]:
    """Deepstack: features of two depths of the tower join the first decoder layers; interleaved M-RoPE."""
    tower = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 48,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return _qwen("Qwen3VL", tower, {"head_dim": 12, "rope_parameters": {**M_ROPE, "mrope_interleaved": True}}, 4)


def internvl() -> tuple[PreTrainedModel, Cases]:
    """Pixel shuffle between tower and projector."""
    model = _build(
        "InternVL",
        vision_config=_tower("internvl_vision", image_size=[32, 32], patch_size=[8, 8]),
        text_config=_text(model_type="qwen2"),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return model, _cases(model, _stacked)


def _per_row(numbers: Sequence[int]) -> Inputs:
    """Two views of one picture in even rows; odd ones have a view, then a blank one that the model drops."""
    pixels = torch.stack([_noise(number, 2, 3, 32, 32) for number in numbers])
    for row, number in enumerate(numbers):
        pixels[row, 1] *= number % 2 == 0
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(len(numbers), 2, 32, 32, dtype=torch.bool)}


def _shuffled(name: str, tower: str) -> tuple[PreTrainedModel, Cases]:
    model = _build(
        name,
        vision_config=_tower(tower),
        text_config=_text(model_type="llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    cases = _cases(model, _per_row)
    pixels = cases["pictures"]
    for key in ("pixel_values", "pixel_attention_mask"):  # one row holds all views
        pixels[key] = pixels[key].flatten(0, 1)[None]
    return model, cases


def idefics3() -> tuple[PreTrainedModel, Cases]:
    """Views of a picture with a pixel mask, pixel shuffle, a LLaMA decoder."""
    return _shuffled("Idefics3", "idefics3_vision")


def smolvlm() -> tuple[PreTrainedModel, Cases]:
    """As Idefics3, with its own way of putting pictures into the embeddings."""
    return _shuffled("SmolVLM", "smolvlm_vision")


def paligemma() -> tuple[PreTrainedModel, Cases]:
    """A prefix with bidirectional attention: masks made outside the decoder."""
    model = _build(
        "PaliGemma",
        vision_config=_tower("siglip_vision_model", vision_use_head=False),
        text_config=_text(model_type="gemma", head_dim=12),
        image_token_index=IMAGE,
        projection_dim=48,
        hidden_size=48,
    )
    cases = _cases(model, _stacked)
    for name in ("padded", "longer"):  # type 0 is the prefix; without types the model's own mask differs
        cases[name]["token_type_ids"] = torch.zeros_like(cases[name]["input_ids"])
    return model, cases


def gemma3() -> tuple[PreTrainedModel, Cases]:
    """Sliding-window and full layers with a mask each, bidirectional pictures; prompts exceed the window."""
    model = _build(
        "Gemma3",
        vision_config=_tower("siglip_vision_model", vision_use_head=False),
        text_config=_text(
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        mm_tokens_per_image=4,
    )
    return model, _cases(model, _stacked, "token_type_ids", ([VISION_START], [VISION_END]))


def _pixtral(numbers: Sequence[int]) -> Inputs:
    """Pictures of several sizes in one frame of 64 x 64."""
    sizes = [(48, 32) if number % 2 == 0 else (32, 64) for number in numbers]
    pixels = torch.zeros(len(numbers), 3, 64, 64)
    for row, (number, (height, width)) in enumerate(zip(numbers, sizes, strict=True)):
        pixels[row, :, :height, :width] = _noise(number, 3, height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def mistral3() -> tuple[PreTrainedModel, Cases]:
    """Pixtral tower with pictures of any size in one frame; a decoder whose prompts exceed its window of 12."""
    model = _build(
        "Mistral3",
        vision_config=_tower("pixtral", image_size=64, head_dim=8),
        text_config=_text(model_type="mistral", sliding_window=12, head_dim=12),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return model, _cases(model, _pixtral)


FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, Cases]]] = {
    build.__name__: build
    for build in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        smolvlm,
        idefics3,
        paligemma,
        gemma3,
        mistral3,
    )
}
