"""What a family's tiny configuration and its pictures need besides `shrink.py`: one table, one row per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pictures as make
import torch
from crossing import crossing
from family import Family
from pictures import Pictures
from shape import Shape
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedVisionConfig

# Rotary frequencies in three sections; `shrink.py` fits them to the channels of a head.
M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# Half of the channels rotate.
HALF_M_ROPE = {**M_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}


def _packed(shape: Shape) -> Callable[[Any], Pictures]:
    """Patches of the tower's size, as Qwen2-VL's processor packs them."""

    def pictures(config: Any) -> Pictures:
        tower = config.vision_config
        frames = getattr(tower, "temporal_patch_size", None) or 1
        return make.packed(shape, 3 * frames * tower.patch_size * tower.patch_size)

    return pictures


def _qwen(shape: Shape, **changes: Any) -> Family:
    """Packed pictures, three position axes."""
    return Family(
        {"text_config.rope_parameters": M_ROPE, "vision_config.patch_size": shape.small} | _dotted(changes),
        _packed(shape),
        around=shape.around,
    )


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


def _chameleon_words(shape: Shape) -> dict[str, int]:
    """Codes of a picture as tokens of the vocabulary."""
    return {
        "<image>": shape.image,
        **{f"IMGIMG{letter * 4}Z": shape.codes + place for place, letter in enumerate("ABCDEFGH")},
    }


def _emu_words(shape: Shape) -> dict[str, int]:
    """As `_chameleon_words`, with the token that ends a row."""
    words = {"<image>": shape.image, "<|extra_200|>": shape.special + 9}
    return words | {f"<|visual token {code:06d}|>": shape.codes + code for code in range(8)}


def corrections(shape: Shape) -> dict[str, Family]:
    """The rows of the table for tiny models of a shape."""
    side = shape.side
    pinpoints = [[side, 2 * side], [2 * side, side]]
    return crossing(shape) | {
        "cohere2_vision": Family({"alignment_intermediate_size": 2 * (shape.width - 16)}),
        "qwen2_vl": _qwen(shape, vision_config__hidden_size=shape.width, vision_config__mlp_ratio=2),
        "qwen2_5_vl": _qwen(shape, vision_config__window_size=4 * shape.small),
        "qwen3_vl": _qwen(shape, text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True}),
        "qwen3_vl_moe": _qwen(shape, text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True}),
        "qwen3_5": _qwen(shape, text_config__rope_parameters={**HALF_M_ROPE, "mrope_interleaved": True}),
        "qwen3_5_moe": _qwen(shape, text_config__rope_parameters={**HALF_M_ROPE, "mrope_interleaved": True}),
        "qwen4_exp": _qwen(
            shape,
            text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True},
            text_config__indexer_n_heads=2,
            text_config__indexer_kv_heads=1,
            text_config__indexer_head_dim=shape.head,
            text_config__indexer_budget=64,
            text_config__indexer_compress_ratio=4,
            text_config__hc_lowrank=16,
            text_config__hc_count=2,
        ),
        "glm4v": _qwen(shape, text_config__rope_parameters=HALF_M_ROPE),
        "glm46v": _qwen(shape, text_config__rope_parameters=HALF_M_ROPE),
        "glmga": _qwen(shape, text_config__rope_parameters=HALF_M_ROPE),
        "glm4v_moe": _qwen(shape, text_config__rope_parameters=HALF_M_ROPE),
        "glm_ocr": _qwen(shape, text_config__rope_parameters=HALF_M_ROPE),
        "glm5_next": _qwen(
            shape,
            text_config__num_key_value_heads=shape.heads,
            text_config__index_kpool=4,
            text_config__linear_head_dim=16,
            text_config__linear_num_heads=4,
            text_config__qk_rope_head_dim=0,
            text_config__hc_mult=2,
            vision_config__projection_intermediate_size=shape.width,
        ),
        "ernie4_5_vl_moe": _qwen(shape, text_config__rope_parameters={**M_ROPE, "mrope_section": [3, 3, 2]}),
        "exaone4_5": _qwen(shape, vision_config__window_size=4 * shape.small),
        "hyperclovax_vision_v2": _qwen(shape, vision_config__window_size=4 * shape.small),
        "hunyuan_vl": _qwen(
            shape,
            vision_config__temporal_patch_size=1,
            vision_config__out_hidden_size=shape.width,
            text_config__head_dim=shape.head,
            vision_config__text_hidden_size=shape.width,
        ),
        "paddleocr_vl": Family(
            {"text_config.rope_parameters": M_ROPE, "vision_config.patch_size": shape.small},
            lambda _: make.patches(shape, shape.small),
        ),
        "kimi_k25": Family(
            {
                "vision_config.patch_size": shape.small,
                "text_config.num_key_value_heads": shape.heads,
                "projection_hidden_size": shape.tower,
            },
            lambda _: make.patches(shape, shape.small),
        ),
        "cohere_compass": _qwen(
            shape,
            text_config__rope_parameters={"full_attention": M_ROPE, "sliding_attention": M_ROPE},
        ),
        "cosmos3_edge": _qwen(shape),
        "cosmos3_omni": _qwen(shape, text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True}),
        "dots3_note": _qwen(
            shape,
            text_config__num_key_value_heads=shape.heads,
            vision_config__adapter_in_dim=shape.tower,
            vision_config__adapter_out_dim=shape.width,
            audio_config__adapter_out_dim=shape.width,
            audio_config__adapter_input_size=shape.tower,
        ),
        "lfm3_vl": _qwen(
            shape,
            text_config__rope_parameters={
                kind: {"rope_type": "default", "rope_theta": 10000.0}
                for kind in ("full_attention", "sliding_attention")
            },
        ),
        "minimax_m3_vl": _qwen(shape),
        "muse_glimmer": Family(
            {
                "vision_config.patch_size": shape.small,
                "out_hidden_size": 4 * shape.tower,
                "projector_hidden_size": shape.width,
            },
            lambda _: make.packed(shape, 6 * shape.small**2),
            around=shape.around,
        ),
        "muse_spark": Family(
            {
                "vision_config.patch_size": shape.small,
                "audio_config.num_hidden_layers": 4,
                "audio_config.out_hidden_size": shape.width,
                "out_hidden_size": 4 * shape.tower,
                "projector_hidden_size": shape.width,
                "text_config.layer_rope_theta": [0 if layer == 1 else 500000.0 for layer in range(shape.layers)],
                "text_config.moe_hidden_size": shape.width,
            },
            lambda _: make.packed(shape, 6 * shape.small**2),
            around=shape.around,
        ),
        "inkling2": Family(
            {
                "vision_config.patch_size": shape.small,
                "vision_config.text_hidden_size": shape.width,
                "vision_config.projection_hidden_dim": shape.width,
                "vision_config.posemb_grid_size": 8,
                "text_config.swa_num_attention_heads": shape.heads,
                "text_config.swa_num_key_value_heads": shape.groups,
                "text_config.swa_head_dim": shape.head,
                "text_config.sliding_window_size": shape.window,
                "text_config.n_layers_per_attn_res_block": 2,
                "text_config.unpadded_vocab_size": shape.vocabulary,
            },
            lambda _: make.pixel_lists(shape, 4 * shape.small**2),
        ),
        "video_llama_3": Family(
            {"vision_config.patch_size": shape.small},
            lambda _: make.packed(shape, 3 * shape.small**2, image_merge_sizes=torch.tensor(2)),
        ),
        "qwen2_5_omni_thinker": _qwen(
            shape,
            vision_config__window_size=4 * shape.small,
            vision_start_token_id=shape.start,
            vision_end_token_id=shape.stop,
            text_config__rope_parameters=M_ROPE,
        ),
        "qwen3_omni_moe_thinker": _qwen(
            shape,
            vision_start_token_id=shape.start,
            vision_end_token_id=shape.stop,
            text_config__rope_parameters={**M_ROPE, "mrope_interleaved": True},
        ),
        "llava": Family({"image_seq_length": shape.patches}),
        "vipllava": Family({"image_seq_length": shape.patches, "vision_feature_layers": [-2, -1]}),
        "llava_next": Family(
            {"image_grid_pinpoints": pinpoints, "image_seq_length": shape.patches}, lambda _: make.tiles(shape.side)
        ),
        "llava_next_video": Family(
            {"image_grid_pinpoints": pinpoints, "image_seq_length": shape.patches}, lambda _: make.tiles(shape.side)
        ),
        "llava_onevision": Family({"image_grid_pinpoints": pinpoints}, lambda _: make.tiles(shape.side)),
        "granite4_vision": Family(
            {
                "image_grid_pinpoints": pinpoints,
                "image_seq_length": shape.patches,
                "downsample_rate": "1/2",
                "deepstack_layer_map": [(-2, 0), (-1, 1)],
                "spatial_target_layers": [2],
                "vision_config.hidden_size": 64,
                "vision_config.num_attention_heads": 4,
            },
            lambda _: make.tiles(shape.side),
        ),
        "internvl": Family(
            {"vision_config.image_size": [shape.side] * 2, "vision_config.patch_size": [shape.patch] * 2}
        ),
        "qianfan_ocr": Family(
            {"vision_config.image_size": [shape.side] * 2, "vision_config.patch_size": [shape.patch] * 2}
        ),
        "idefics2": Family(
            {"perceiver_config.resampler_n_heads": 2 * shape.tower_heads}, lambda _: make.views(shape.side)
        ),
        "idefics3": Family({}, lambda _: make.views(shape.side)),
        "smolvlm": Family({}, lambda _: make.views(shape.side)),
        "granite_docling": Family(
            {"scale_factor": 2 if shape.side % (4 * shape.patch) else 4}, lambda _: make.flagged_views(shape.side)
        ),
        "aria": Family({"projector_patch_to_query_dict": {shape.patches: 4}}),
        "chameleon": Family(
            {
                "vocabulary_map": _chameleon_words(shape),
                "vq_config.resolution": shape.side,
                "vq_config.num_embeddings": 8,
                "vq_config.base_channels": 32,
                "vq_config.channel_multiplier": [1, 1, 1],
                "vq_config.latent_channels": 32,
            },
            lambda _: make.stacked(shape.side),
        ),
        "emu3": Family(
            {
                "vocabulary_map": _emu_words(shape),
                "vq_config.codebook_size": 8,
                "vq_config.base_channels": 32,
                "vq_config.channel_multiplier": [1, 1],
                "vq_config.hidden_size": 32,
                "vq_config.num_attention_heads": 2,
                "vq_config.num_res_blocks": 1,
                "vq_config.attn_resolutions": [],
                "vq_config.embed_dim": 4,
            },
            lambda _: make.stacked(shape.side, image_sizes=torch.tensor([shape.side, shape.side])),
        ),
        "deepseek_ocr2": Family(
            {
                "text_config.mlp_layer_types": ["dense", *["sparse"] * (shape.layers - 1)],
                "text_config.num_experts_per_tok": shape.chosen,
                "vision_config.sam_config.image_size": 64,
                "vision_config.sam_config.downsample_channels": [shape.tower] * 2,
            },
            lambda _: make.local_views(128, 128),
        ),
        "deepseek_vl_hybrid": Family(
            {"high_res_vision_config.image_size": 128, "high_res_vision_config.global_attn_indexes": [1]},
            lambda _: (
                lambda numbers: make.stacked(shape.side)(numbers) | make.stacked(128, "high_res_pixel_values")(numbers)
            ),
        ),
        "fuyu": Family(
            {"patch_size": shape.patch, "image_size": shape.side},
            lambda _: make.rows_of_patches(3 * shape.patch**2, shape.patches),
        ),
        "llama4": Family(
            {
                "vision_config.projector_input_dim": shape.tower,
                "vision_config.projector_output_dim": shape.tower,
                "vision_config.vision_output_dim": shape.tower,
                "vision_config.intermediate_size": 4 * shape.tower,
                "text_config.intermediate_size_mlp": shape.inner,
                "text_config.no_rope_layers": [int(layer % 3 < 2) for layer in range(shape.layers)],
                "text_config.attention_chunk_size": 16,
            }
        ),
        "ovis2": Family(
            {
                "visual_indicator_token_ids": [shape.special + place for place in range(5, 10)],
                "hidden_size": shape.width,
            }
        ),
        "paligemma": Family({"projection_dim": shape.width}, types=None),
        "gemma3": Family({"mm_tokens_per_image": shape.patches // 4}, around=shape.around),
        "shieldgemma2": Family({"mm_tokens_per_image": shape.patches // 4}, around=shape.around),
        "mistral3": Family(
            {"vision_config.image_size": 8 * shape.patch, "spatial_merge_size": 2}, lambda _: make.framed(shape.patch)
        ),
        "lighton_ocr": Family(
            {"vision_config.image_size": 8 * shape.patch, "spatial_merge_size": 2}, lambda _: make.framed(shape.patch)
        ),
        "mistral_large4": Family(
            {"vision_config.image_size": 8 * shape.patch, "spatial_merge_size": 2}, lambda _: make.framed(shape.patch)
        ),
        "lfm2_vl": Family(
            {"vision_config.patch_size": shape.small}, lambda _: make.padded_patches(shape, 3 * shape.small**2)
        ),
        "gemma4": Family(
            {
                "vision_config": Gemma4VisionConfig,
                "vision_config.patch_size": shape.small,
                "vision_config.pooling_kernel_size": 2,
                "text_config.global_head_dim": 2 * shape.head,
                "text_config.num_kv_shared_layers": 0,
            },
            lambda _: make.positioned_patches(shape, 3 * shape.small**2),
        ),
        "gemma4_unified": Family(
            {
                "vision_config": Gemma4UnifiedVisionConfig,
                "vision_config.patch_size": shape.small,
                "vision_config.pooling_kernel_size": 2,
                "vision_config.mm_embed_dim": shape.tower,
                "vision_config.mm_posemb_size": 64,
                "vision_config.output_proj_dims": shape.tower,
                "text_config.global_head_dim": 2 * shape.head,
            },
            lambda _: make.positioned_patches(shape, 12 * shape.small**2),
        ),
        "janus": Family({"vq_config.embed_dim": 8, "vision_config.projection_dim": shape.width}),
        "minicpmv4_6": Family({"vision_config.patch_size": shape.small}, lambda _: make.strips(shape.small)),
        "minicpmv4_7": Family({"vision_config.patch_size": shape.small}, lambda _: make.strips(shape.small)),
        "minicpm_ocr": Family({"vision_config.patch_size": shape.small}, lambda _: make.strips(shape.small)),
        "step3p7": Family(
            {"text_config.sliding_window": shape.window}, lambda _: make.local_views(shape.side, shape.side)
        ),
        "unlimited_ocr": Family(
            {
                "text_config.num_key_value_heads": shape.heads,
                "vision_config.sam_config.image_size": 64,
                "vision_config.sam_config.output_channels": shape.tower,
                "vision_config.sam_config.downsample_channels": [shape.tower] * 2,
                "vision_config.encoder_config.hidden_size": shape.tower,
            },
            lambda _: make.local_views(128, 128, grid=True),
        ),
        "molmo2": Family(
            {
                "image_patch_id": shape.image,
                "vision_config.num_position_embeddings": 16,
                "vision_config.image_size": [32, 32],
                "adapter_config.vision_feature_layer": [-1, -2],
                "adapter_config.hidden_size": shape.tower,
                "adapter_config.num_attention_heads": shape.tower_heads,
                "adapter_config.num_key_value_heads": shape.tower_heads,
                "adapter_config.head_dim": shape.tower // shape.tower_heads,
                "adapter_config.intermediate_size": shape.tower_inner,
                "adapter_config.text_hidden_size": shape.width,
            },
            lambda _: make.pooled_crops(shape.patch),
        ),
        "mistral4": Family(tokens=0),
        "nemotron_h_omni": Family(
            {
                "vision_config.video_temporal_patch_size": 2,
                "projector_hidden_size": shape.width,
                "vision_hidden_size": shape.tower,
            },
            lambda _: make.packed(shape, 3 * shape.patch**2, "image_grid_hw", 2),
        ),
        "fast_vlm": Family(needs=("timm",)),
        "gemma3n": Family(needs=("timm",)),
        "perception_lm": Family(needs=("timm",)),
        "inkling_mm_model": Family(needs=("scipy",)),
    }
