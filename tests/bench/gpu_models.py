"""The models of the GPU benchmark of answers: configurations of two 7B models, random weights, initialised in place."""

from typing import Any

import torch
import transformers
from cpu_models import build, text_sizes
from cpu_shapes import BEGIN, PAD, SHAPES, VIDEO, VISION_END, VISION_START, Shape

_LLAVA: dict[str, Any] = {
    "tower": 1024,
    "tower_layers": 24,
    "tower_heads": 16,
    "width": 4096,
    "layers": 32,
    "heads": 32,
}
_QWEN: dict[str, Any] = {"tower": 1280, "tower_layers": 32, "tower_heads": 16, "width": 3584, "layers": 28, "heads": 28}
# 576 visual and 64 other tokens; Qwen's picture is 672 x 672 pixels.
MODELS = {
    "LLaVA-1.5-7B": Shape("LLaVA-1.5-7B", "llava", 336, kv_heads=32, mlp=11008, vocabulary=32064, **_LLAVA),
    "Qwen2.5-VL-7B": Shape("Qwen2.5-VL-7B", "qwen2_vl", 672, kv_heads=4, mlp=18944, vocabulary=152064, **_QWEN),
    "tiny-A": SHAPES["tiny-A"],
    "tiny-B": SHAPES["tiny-B"],
}
# Inputs of an MLP in the tower of Qwen2.5-VL-7B, whose width is 1280.
TOWER_MLP = 3420 / 1280


def make(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model, created on the device in its dtype, so that it is in memory once. It never emits an end token."""
    shape, before = MODELS[name], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = build(shape) if shape.family == "llava" else _qwen2_5_vl(shape)
    finally:
        torch.set_default_dtype(before)
    return model.to(device)


def _qwen2_5_vl(shape: Shape) -> Any:
    """As Qwen2.5-VL is built: windows of 8 x 8 patches in the tower, except in four of the 32 layers."""
    torch.manual_seed(0)
    half = shape.width // shape.heads // 2
    axis = half * 3 // 8
    quarter = max(1, shape.tower_layers // 4)
    tower = {
        "depth": shape.tower_layers,
        "hidden_size": shape.tower,
        "intermediate_size": int(shape.tower * TOWER_MLP),
        "num_heads": shape.tower_heads,
        "out_hidden_size": shape.width,
        "patch_size": shape.patch,
        "window_size": 8 * shape.patch,
        "fullatt_block_indexes": list(range(quarter - 1, shape.tower_layers, quarter)),
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * axis, axis, axis]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=tower,
        text_config={**text_sizes(shape), "rope_parameters": rope},
        image_token_id=shape.image_token,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.bos_token_id, model.generation_config.pad_token_id = BEGIN, PAD
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)
