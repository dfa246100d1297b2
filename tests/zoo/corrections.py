"""What a family's tiny configuration and its pictures need besides `shrink.py`: one table, one row per family."""

from __future__ import annotations

from typing import Any

import pictures as make
import torch
from crossing import CROSSING
from family import Family
from pictures import Pictures
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedVisionConfig

# Rotary frequencies of a head of 16 channels: 8, in three sections.
M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# Half of the channels rotate.
HALF_M_ROPE = {**M_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
PINPOINTS = [[32, 64], [64, 32]]
# Codes of a picture as tokens of the vocabulary, for the families whose pictures are tokens.
CHAMELEON_WORDS = {"<image>": 90, **{f"IMGIMG{letter * 4}Z": 100 + place for place, letter in enumerate("ABCDEFGH")}}
EMU_WORDS = {"<image>": 90, "<|extra_200|>": 99, **{f"<|visual token {code:06d}|>": 100 + code for code in range(8)}}


def _packed(config: Any) -> Pictures:
    """Patches of the tower's size, as Qwen2-VL's processor packs them."""
    tower = config.vision_config
    frames = getattr(tower, "temporal_patch_size", None) or 1
    return make.packed(3 * frames * tower.patch_size * tower.patch_size)


def _squares(config: Any) -> Pictures:
    return make.patches(config.vision_config.patch_size)


def _qwen(**changes: Any) -> Family:
    """Packed pictures, three position axes."""
    return Family(
        {"text_config.rope_parameters": M_ROPE, "vision_config.patch_size": 4} | _dotted(changes),
        _packed,
        around=([92], [93]),
    )


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


CORRECTIONS: dict[str, Family] = CROSSING | {
    "cohere2_vision": Family({"alignment_intermediate_size": 96}),
    "qwen2_vl": _qwen(vision_config__hidden_size=64, vision_config__mlp_ratio=2),
    "qwen2_5_vl": _qwen(vision_config__window_size=16),
    "qwen3_vl": _qwen(text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True}),
    "qwen3_vl_moe": _qwen(text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True}),
    "qwen3_5": _qwen(text_config__rope_parameters={**HALF_M_ROPE, "mrope_interleaved": True}),
    "qwen3_5_moe": _qwen(text_config__rope_parameters={**HALF_M_ROPE, "mrope_interleaved": True}),
    "qwen4_exp": _qwen(
        text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True},
        text_config__indexer_n_heads=2,
        text_config__indexer_kv_heads=1,
        text_config__indexer_head_dim=16,
        text_config__indexer_budget=64,
        text_config__indexer_compress_ratio=4,
        text_config__hc_lowrank=16,
        text_config__hc_count=2,
    ),
    "glm4v": _qwen(text_config__rope_parameters=HALF_M_ROPE),
    "glm46v": _qwen(text_config__rope_parameters=HALF_M_ROPE),
    "glmga": _qwen(text_config__rope_parameters=HALF_M_ROPE),
    "glm4v_moe": _qwen(text_config__rope_parameters=HALF_M_ROPE),
    "glm_ocr": _qwen(text_config__rope_parameters=HALF_M_ROPE),
    "glm5_next": _qwen(
        text_config__num_key_value_heads=4,
        text_config__index_kpool=4,
        text_config__linear_head_dim=16,
        text_config__linear_num_heads=4,
        text_config__qk_rope_head_dim=0,
        text_config__hc_mult=2,
        vision_config__projection_intermediate_size=64,
    ),
    "ernie4_5_vl_moe": _qwen(text_config__rope_parameters={**M_ROPE, "mrope_section": [3, 3, 2]}),
    "exaone4_5": _qwen(vision_config__window_size=16),
    "hyperclovax_vision_v2": _qwen(vision_config__window_size=16),
    "hunyuan_vl": _qwen(
        vision_config__temporal_patch_size=1,
        vision_config__out_hidden_size=64,
        text_config__head_dim=16,
        vision_config__text_hidden_size=64,
    ),
    "paddleocr_vl": Family({"text_config.rope_parameters": M_ROPE, "vision_config.patch_size": 4}, _squares),
    "kimi_k25": Family(
        {
            "vision_config.patch_size": 4,
            "text_config.num_key_value_heads": 4,
            "projection_hidden_size": 32,
        },
        _squares,
    ),
    "cohere_compass": _qwen(
        text_config__rope_parameters={"full_attention": M_ROPE, "sliding_attention": M_ROPE},
    ),
    "cosmos3_edge": _qwen(),
    "cosmos3_omni": _qwen(text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True}),
    "dots3_note": _qwen(
        text_config__num_key_value_heads=4,
        vision_config__adapter_in_dim=32,
        vision_config__adapter_out_dim=64,
        audio_config__adapter_out_dim=64,
        audio_config__adapter_input_size=32,
    ),
    "lfm3_vl": _qwen(
        text_config__rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    ),
    "minimax_m3_vl": _qwen(),
    "muse_glimmer": Family(
        {"vision_config.patch_size": 4, "out_hidden_size": 128, "projector_hidden_size": 64},
        lambda _: make.packed(96),
        around=([92], [93]),
    ),
    "muse_spark": Family(
        {
            "vision_config.patch_size": 4,
            "audio_config.num_hidden_layers": 4,
            "audio_config.out_hidden_size": 64,
            "out_hidden_size": 128,
            "projector_hidden_size": 64,
            "text_config.layer_rope_theta": [500000.0, 0, 500000.0],
            "text_config.moe_hidden_size": 64,
        },
        lambda _: make.packed(96),
        around=([92], [93]),
    ),
    "inkling2": Family(
        {
            "vision_config.patch_size": 4,
            "vision_config.text_hidden_size": 64,
            "vision_config.projection_hidden_dim": 64,
            "vision_config.posemb_grid_size": 8,
            "text_config.swa_num_attention_heads": 4,
            "text_config.swa_num_key_value_heads": 2,
            "text_config.swa_head_dim": 16,
            "text_config.sliding_window_size": 12,
            "text_config.n_layers_per_attn_res_block": 2,
            "text_config.unpadded_vocab_size": 128,
        },
        lambda _: make.pixel_lists(64),
    ),
    "video_llama_3": Family(
        {"vision_config.patch_size": 4}, lambda _: make.packed(48, image_merge_sizes=torch.tensor(2))
    ),
    "qwen2_5_omni_thinker": _qwen(
        vision_config__window_size=16,
        vision_start_token_id=92,
        vision_end_token_id=93,
        text_config__rope_parameters=M_ROPE,
    ),
    "qwen3_omni_moe_thinker": _qwen(
        vision_start_token_id=92,
        vision_end_token_id=93,
        text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True},
    ),
    "llava": Family({"image_seq_length": 16}),
    "vipllava": Family({"image_seq_length": 16, "vision_feature_layers": [-2, -1]}),
    "llava_next": Family({"image_grid_pinpoints": PINPOINTS, "image_seq_length": 16}, lambda _: make.tiles()),
    "llava_next_video": Family({"image_grid_pinpoints": PINPOINTS, "image_seq_length": 16}, lambda _: make.tiles()),
    "llava_onevision": Family({"image_grid_pinpoints": PINPOINTS}, lambda _: make.tiles()),
    "granite4_vision": Family(
        {
            "image_grid_pinpoints": PINPOINTS,
            "image_seq_length": 16,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [(-2, 0), (-1, 1)],
            "spatial_target_layers": [2],
            "vision_config.hidden_size": 64,
        },
        lambda _: make.tiles(),
    ),
    "internvl": Family({"vision_config.image_size": [32, 32], "vision_config.patch_size": [8, 8]}),
    "qianfan_ocr": Family({"vision_config.image_size": [32, 32], "vision_config.patch_size": [8, 8]}),
    "idefics2": Family({}, lambda _: make.views()),
    "idefics3": Family({}, lambda _: make.views()),
    "smolvlm": Family({}, lambda _: make.views()),
    "granite_docling": Family({}, lambda _: make.flagged_views()),
    "aria": Family({"projector_patch_to_query_dict": {16: 4}}),
    "chameleon": Family(
        {
            "vocabulary_map": CHAMELEON_WORDS,
            "vq_config.resolution": 32,
            "vq_config.num_embeddings": 8,
            "vq_config.base_channels": 32,
            "vq_config.channel_multiplier": [1, 1, 1],
            "vq_config.latent_channels": 32,
        },
        lambda _: make.stacked(32),
    ),
    "emu3": Family(
        {
            "vocabulary_map": EMU_WORDS,
            "vq_config.codebook_size": 8,
            "vq_config.base_channels": 32,
            "vq_config.channel_multiplier": [1, 1],
            "vq_config.hidden_size": 32,
            "vq_config.num_res_blocks": 1,
            "vq_config.attn_resolutions": [],
            "vq_config.embed_dim": 4,
        },
        lambda _: make.stacked(32, image_sizes=torch.tensor([32, 32])),
    ),
    "deepseek_ocr2": Family(
        {
            "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
            "text_config.num_experts_per_tok": 2,
            "vision_config.sam_config.image_size": 64,
            "vision_config.sam_config.downsample_channels": [32, 32],
        },
        lambda _: make.local_views(128, 128),
    ),
    "deepseek_vl_hybrid": Family(
        {"high_res_vision_config.image_size": 128, "high_res_vision_config.global_attn_indexes": [1]},
        lambda _: lambda numbers: make.stacked(32)(numbers) | make.stacked(128, "high_res_pixel_values")(numbers),
    ),
    "fuyu": Family({"patch_size": 8, "image_size": 32}, lambda _: make.rows_of_patches(192)),
    "llama4": Family(
        {
            "vision_config.projector_input_dim": 32,
            "vision_config.projector_output_dim": 32,
            "vision_config.vision_output_dim": 32,
            "vision_config.intermediate_size": 128,
            "text_config.intermediate_size_mlp": 96,
            "text_config.no_rope_layers": [1, 1, 0],
            "text_config.attention_chunk_size": 16,
        }
    ),
    "ovis2": Family({"visual_indicator_token_ids": [95, 96, 97, 98, 99], "hidden_size": 64}),
    "paligemma": Family({"projection_dim": 64}, types=None),
    "gemma3": Family({"mm_tokens_per_image": 4}, around=([92], [93])),
    "shieldgemma2": Family({"mm_tokens_per_image": 4}, around=([92], [93])),
    "mistral3": Family({"vision_config.image_size": 64, "spatial_merge_size": 2}, lambda _: make.framed()),
    "lighton_ocr": Family({"vision_config.image_size": 64, "spatial_merge_size": 2}, lambda _: make.framed()),
    "mistral_large4": Family({"vision_config.image_size": 64, "spatial_merge_size": 2}, lambda _: make.framed()),
    "lfm2_vl": Family({"vision_config.patch_size": 4}, lambda _: make.padded_patches(48)),
    "gemma4": Family(
        {
            "vision_config": Gemma4VisionConfig,
            "vision_config.patch_size": 4,
            "vision_config.pooling_kernel_size": 2,
            "text_config.global_head_dim": 32,
            "text_config.num_kv_shared_layers": 0,
        },
        lambda _: make.positioned_patches(48),
    ),
    "gemma4_unified": Family(
        {
            "vision_config": Gemma4UnifiedVisionConfig,
            "vision_config.patch_size": 4,
            "vision_config.pooling_kernel_size": 2,
            "vision_config.mm_embed_dim": 32,
            "vision_config.mm_posemb_size": 64,
            "vision_config.output_proj_dims": 32,
            "text_config.global_head_dim": 32,
        },
        lambda _: make.positioned_patches(192),
    ),
    "janus": Family({"vq_config.embed_dim": 8, "vision_config.projection_dim": 64}),
    "minicpmv4_6": Family({"vision_config.patch_size": 4}, lambda _: make.strips(4)),
    "minicpmv4_7": Family({"vision_config.patch_size": 4}, lambda _: make.strips(4)),
    "minicpm_ocr": Family({"vision_config.patch_size": 4}, lambda _: make.strips(4)),
    "step3p7": Family({"text_config.sliding_window": 12}, lambda _: make.local_views(32, 32)),
    "unlimited_ocr": Family(
        {
            "text_config.num_key_value_heads": 4,
            "vision_config.sam_config.image_size": 64,
            "vision_config.sam_config.output_channels": 32,
            "vision_config.sam_config.downsample_channels": [32, 32],
            "vision_config.encoder_config.hidden_size": 32,
        },
        lambda _: make.local_views(128, 128, grid=True),
    ),
    "molmo2": Family(
        {
            "image_patch_id": 90,
            "vision_config.num_position_embeddings": 16,
            "vision_config.image_size": [32, 32],
            "adapter_config.vision_feature_layer": [-1, -2],
            "adapter_config.hidden_size": 32,
            "adapter_config.num_attention_heads": 4,
            "adapter_config.num_key_value_heads": 4,
            "adapter_config.head_dim": 8,
            "adapter_config.intermediate_size": 64,
            "adapter_config.text_hidden_size": 64,
        },
        lambda _: make.pooled_crops(),
    ),
    "mistral4": Family(tokens=0),
    "nemotron_h_omni": Family(
        {
            "vision_config.video_temporal_patch_size": 2,
            "projector_hidden_size": 64,
            "vision_hidden_size": 32,
        },
        lambda _: make.packed(192, "image_grid_hw", 2),
    ),
    "fast_vlm": Family(needs=("timm",)),
    "gemma3n": Family(needs=("timm",)),
    "perception_lm": Family(needs=("timm",)),
    "inkling_mm_model": Family(needs=("scipy",)),
}
