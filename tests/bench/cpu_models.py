"""The models of the CPU benchmark: transformers' classes with random weights. Runs with transformers 4.57 and 5."""

from pathlib import Path
from typing import Any

import torch
import transformers
from cpu_shapes import BEGIN, END, PAD, VIDEO, VISION_END, VISION_START, Shape, asked_inputs

ROOT = Path(__file__).resolve().parents[2]
IS_5 = int(transformers.__version__.split(".")[0]) >= 5


def build(shape: Shape, seed: int = 0) -> Any:
    """The model in float32; it never emits an end token."""
    torch.manual_seed(seed)
    if shape.folder:
        model = transformers.LlavaForConditionalGeneration.from_pretrained(ROOT / shape.folder)
    else:
        model = _llava(shape) if shape.family == "llava" else _qwen2_vl(shape)
        model.generation_config.bos_token_id = BEGIN
        model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def model_inputs(shape: Shape, question: dict[str, int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What `generate` takes for a question (cpu_worker.py)."""
    found: dict[str, Any] = {name: torch.from_numpy(array) for name, array in asked_inputs(shape, question).items()}
    found["pixel_values"] = found["pixel_values"].to(dtype)
    if shape.family == "qwen2_vl" and IS_5:
        found["mm_token_type_ids"] = (found["input_ids"] == shape.image_token).long()
    return found


def text_sizes(shape: Shape) -> dict[str, Any]:
    """The settings of the decoder."""
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 8192,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }


def _llava(shape: Shape) -> Any:
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": shape.tower,
        "intermediate_size": 4 * shape.tower,
        "num_hidden_layers": shape.tower_layers,
        "num_attention_heads": shape.tower_heads,
        "image_size": shape.side,
        "patch_size": shape.patch,
        "projection_dim": shape.tower,
    }
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config={**text_sizes(shape), "model_type": "llama"},
        image_token_index=shape.image_token,
        image_seq_length=shape.visual_tokens,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_vl(shape: Shape) -> Any:
    tower = {
        "depth": shape.tower_layers,
        "embed_dim": shape.tower,
        "num_heads": shape.tower_heads,
        "mlp_ratio": 4,
        "hidden_size": shape.width,
        "patch_size": shape.patch,
    }
    half = shape.width // shape.heads // 2
    axis = half * 3 // 8
    rope = {"rope_type": "default", "mrope_section": [half - 2 * axis, axis, axis]}
    # transformers 4 has another name for the same option.
    named = {"rope_parameters": {**rope, "rope_theta": 10000.0}} if IS_5 else {"rope_scaling": rope}
    config = transformers.Qwen2VLConfig(
        vision_config=tower,
        text_config={**text_sizes(shape), **named},
        image_token_id=shape.image_token,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)
