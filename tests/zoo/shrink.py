"""Shrink a transformers configuration to a tiny one by the names of its keys, whatever the family.

A key that a configuration class does not have is left out; lists with an entry per layer keep every kind of layer that
the default has. What a family needs besides is in `corrections.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from shape import Shape
from transformers import PretrainedConfig


def _tokens(shape: Shape) -> dict[str, Any]:
    return {
        "bos_token_id": shape.begin,
        "eos_token_id": shape.end,
        "pad_token_id": shape.pad,
        "image_token_id": shape.image,
        "image_token_index": shape.image,
        "video_token_id": shape.special + 1,
        "video_token_index": shape.special + 1,
        "audio_token_id": shape.special + 4,
        "audio_token_index": shape.special + 4,
        **dict.fromkeys(
            ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"), shape.start
        ),
        **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"), shape.stop),
        **dict.fromkeys(("video_start_token_id", "video_end_token_id"), shape.special + 5),
    }


def _experts(shape: Shape) -> dict[str, Any]:
    return {
        **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), shape.experts),
        **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), shape.chosen),
        **dict.fromkeys(("moe_num_shared_experts", "n_shared_experts"), 1),
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"), 32),
        **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    }


def _text(shape: Shape) -> dict[str, Any]:
    return _experts(shape) | {
        "vocab_size": shape.vocabulary,
        "vocab_size_per_layer_input": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head,
        "sliding_window": shape.window,
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
        "query_pre_attn_scalar": shape.head,
        "index_head_dim": 16,
        "index_n_heads": 4,
        "index_topk": 8,
        "d_model": shape.width,
        "d_kv": shape.width // shape.heads,
        "d_ff": shape.inner,
        **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), shape.layers - 1),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_heads"), shape.heads),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), shape.inner),
        "word_embed_proj_dim": shape.width,
        "embed_dim": shape.width,
        "layers": shape.layers,
        "attention_heads": shape.heads,
    }


def _tower(shape: Shape) -> dict[str, Any]:
    return _experts(shape) | {
        "hidden_size": shape.tower,
        "embed_dim": shape.tower,
        "intermediate_size": shape.tower_inner,
        "mlp_dim": shape.tower_inner,
        "encoder_hidden_size": shape.tower,
        **dict.fromkeys(("num_hidden_layers", "depth", "num_layers"), shape.tower_layers),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), shape.tower_heads),
        "head_dim": shape.tower // shape.tower_heads,
        "image_size": shape.side,
        "patch_size": shape.patch,
        "projection_dim": shape.tower,
        "out_hidden_size": shape.width,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "fullatt_block_indexes": [1],
        "vision_use_head": False,
        "d_model": shape.tower,
        "output_dim": shape.width,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), shape.tower_layers),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), shape.tower_heads),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), shape.tower_inner),
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 512,
    }


_OTHER_ACTIVATION = {"silu": "gelu", "gelu": "relu", "gelu_pytorch_tanh": "gelu", "quick_gelu": "gelu", "relu2": "silu"}
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


def shrunk(kind: type[PretrainedConfig], changes: Mapping[str, Any], shape: Shape, path: str = "") -> PretrainedConfig:
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
    for key, value in ({} if _holds_text(default, path) else (_tower(shape) if is_tower else _text(shape))).items():
        if key in known and defaults.get(key) is not None:
            settings[key] = _like(defaults[key], value, shape.layers)
    if settings.get("kv_lora_rank"):  # latent attention: as many key heads as query heads, rotated channels apart
        settings |= {"num_key_value_heads": shape.heads} | ({"head_dim": 8} if "head_dim" in known else {})
    settings |= {key: value for key, value in _tokens(shape).items() if key in known}
    for key in _PER_LAYER:
        if defaults.get(key):
            settings[key] = per_layer(defaults[key], settings.get("num_hidden_layers", shape.layers))
    for key in default.sub_configs:
        part = given.pop(key, getattr(default, key, None))
        if part is None:
            settings[key] = None
            continue
        inner = {name.removeprefix(f"{key}."): value for name, value in changes.items() if name.startswith(f"{key}.")}
        part_kind = part if isinstance(part, type) else type(part)
        settings[key] = (
            shrunk(part_kind, inner, shape, f"{path}.{key}") if issubclass(part_kind, PretrainedConfig) else part
        )
    if shape.other:
        settings |= _others(defaults)
    if shape.tied is not None and "tie_word_embeddings" in known:
        settings["tie_word_embeddings"] = shape.tied
    if rope := given.get("rope_parameters"):
        head = given.get("head_dim") or settings.get("head_dim") or shape.width // shape.heads
        given["rope_parameters"] = _fitted(rope, head)
    return kind(**{**settings, **given})


def _others(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Biases where there are none by default, none where there are, and other activations."""
    biases = {key: not value for key, value in defaults.items() if "bias" in key and isinstance(value, bool)}
    kinds = ("hidden_act", "hidden_activation", "projector_hidden_act")
    given = {key: value for key, value in defaults.items() if key in kinds and value in _OTHER_ACTIVATION}
    return biases | {key: _OTHER_ACTIVATION[value] for key, value in given.items()}


def _fitted(rope: dict[str, Any], head: int) -> dict[str, Any]:
    """Rotary parameters, also of several kinds of layers, whose sections add up to the frequencies of a head."""
    if "mrope_section" not in rope:
        return {key: _fitted(value, head) if isinstance(value, dict) else value for key, value in rope.items()}
    count = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    first, last = rope["mrope_section"][0], rope["mrope_section"][-1]
    small = count // 4
    half = (count - small) // 2
    # Height and width may have to have equal shares.
    sections = [small, half, count - small - half] if first <= last else [half, half, count - 2 * half]
    return {**rope, "mrope_section": sections}


def per_layer(kinds: Iterable[str], count: int) -> list[str]:
    """`count` entries in which the kinds of the default take turns, in the order of their first occurrence."""
    found = list(dict.fromkeys(kinds))
    return [found[place % len(found)] for place in range(count)]


def _holds_text(config: Any, path: str) -> bool:
    """Whether a configuration only joins others: its own keys are not sizes of layers."""
    return not path and "text_config" in config.sub_configs


def _like(default: Any, value: Any, layers: int) -> Any:
    """`value` as often as the default has entries, where that is a list with an entry per layer or per kind."""
    if isinstance(default, (list, tuple)) and isinstance(value, int):
        return [value] * min(len(default), layers)
    return value
