"""Shrink a transformers configuration to a tiny one by the names of its keys, whatever the family.

A key that a configuration class does not have is left out; lists with an entry per layer keep every kind of layer that
the default has. What a family needs besides is in `corrections.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

# Ids of the tiny vocabulary; text is 3..79.
VOCABULARY, BEGIN, END, PAD, IMAGE, VIDEO, START, STOP, AUDIO = 128, 1, 2, 0, 90, 91, 92, 93, 94
LAYERS, WIDTH = 3, 64

_TOKENS: dict[str, Any] = {
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"), START),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"), STOP),
    **dict.fromkeys(("video_start_token_id", "video_end_token_id"), 95),
}
_EXPERTS: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
}
# 4 query heads of 16 channels on 2 key-value heads.
_TEXT: dict[str, Any] = _EXPERTS | {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 12,
    "max_position_embeddings": 512,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": 16,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 8,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 96,
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 96),
    "word_embed_proj_dim": WIDTH,
    "embed_dim": WIDTH,
    "layers": LAYERS,
    "attention_heads": 4,
}
# 32 x 32 pixels in 4 x 4 patches.
_TOWER: dict[str, Any] = _EXPERTS | {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "mlp_dim": 64,
    "encoder_hidden_size": 32,
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 4),
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
    "out_hidden_size": WIDTH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "vision_use_head": False,
    "d_model": 32,
    "output_dim": WIDTH,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 64),
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
# Lists with an entry per layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types")
_TOWERS = (
    "vision",
    "adapter",
    "vq",
    "vit",
    "audio",
    "qformer",
    "perceiver",
    "sam",
    "dino",
    "encoder_config",
    "resampler",
)


def shrunk(kind: type[PretrainedConfig], changes: Mapping[str, Any], path: str = "") -> PretrainedConfig:
    """A tiny configuration of class `kind`.

    changes: values by dotted key ("vision_config.patch_size"); the value `type` of a sub-configuration names its class,
    and None leaves the sub-configuration out.
    """
    default: Any = kind()
    is_tower = any(part in path for part in _TOWERS)
    given = {key: value for key, value in changes.items() if "." not in key}
    settings: dict[str, Any] = {}
    defaults = vars(default)  # attributes that vary by layer refuse to be read as one
    known = {*inspect.signature(kind.__init__).parameters, *defaults}
    for key, value in ({} if _holds_text(default, path) else (_TOWER if is_tower else _TEXT)).items():
        if key in known and defaults.get(key) is not None:
            settings[key] = _like(defaults[key], value)
    if settings.get("kv_lora_rank"):  # latent attention: as many key heads as query heads, rotated channels apart
        settings |= {"num_key_value_heads": 4} | ({"head_dim": 8} if "head_dim" in known else {})
    settings |= {key: value for key, value in _TOKENS.items() if key in known}
    for key in _PER_LAYER:
        if defaults.get(key):
            settings[key] = per_layer(defaults[key], settings.get("num_hidden_layers", LAYERS))
    for key in default.sub_configs:
        part = given.pop(key, getattr(default, key, None))
        if part is None:
            settings[key] = None
            continue
        inner = {name.removeprefix(f"{key}."): value for name, value in changes.items() if name.startswith(f"{key}.")}
        part_kind = part if isinstance(part, type) else type(part)
        settings[key] = shrunk(part_kind, inner, f"{path}.{key}") if issubclass(part_kind, PretrainedConfig) else part
    return kind(**{**settings, **given})


def per_layer(kinds: Iterable[str], count: int) -> list[str]:
    """`count` entries in which the kinds of the default take turns, in the order of their first occurrence."""
    found = list(dict.fromkeys(kinds))
    return [found[place % len(found)] for place in range(count)]


def _holds_text(config: Any, path: str) -> bool:
    """Whether a configuration only joins others: its own keys are not sizes of layers."""
    return not path and "text_config" in config.sub_configs


def _like(default: Any, value: Any) -> Any:
    """`value` as often as the default has entries, where that is a list with an entry per layer or per kind."""
    if isinstance(default, (list, tuple)) and isinstance(value, int):
        return [value] * min(len(default), LAYERS)
    return value
