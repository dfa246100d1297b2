"""Rows of `corrections.py`: families whose decoder reads pictures through cross-attention, or through a Q-Former."""

from __future__ import annotations

import pictures as make
from family import Family
from shape import Shape


def crossing(shape: Shape) -> dict[str, Family]:
    """The rows for tiny models of a shape."""
    return {
        "mllama": Family(
            {
                "text_config.cross_attention_layers": [1],
                "vision_config.vision_output_dim": 2 * shape.tower,
                "vision_config.intermediate_layers_indices": [0],
                "vision_config.num_global_layers": 1,
                "vision_config.attention_heads": shape.tower_heads,
                "vision_config.max_num_tiles": 2,
                "vision_config.supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            lambda _: make.aspect_tiles(shape.side),
            tokens=1,
            beside=make.seen_tiles(shape.image),
        ),
        "florence2": Family(
            {
                "vision_config.depths": [1, 1],
                "vision_config.patch_size": [7, 3],
                "vision_config.patch_stride": [4, 2],
                "vision_config.patch_padding": [3, 1],
                "vision_config.patch_prenorm": [False, True],
                "vision_config.embed_dim": [16, 32],
                "vision_config.num_heads": [2, 4],
                "vision_config.num_groups": [2, 4],
                "vision_config.window_size": 4,
                "vision_config.projection_dim": shape.width,
            },
        ),
        "blip": Family(tokens=0, text=False, several=False),
        "git": Family(tokens=0),
        "udop": Family(tokens=0, beside=make.boxes, text=False, several=False),
        "pix2struct": Family(
            {
                "vision_config.patch_embed_hidden_size": 3 * shape.small**2,
                "vision_config.seq_len": 64,
                "vision_config.hidden_size": shape.width,
                "vision_config.d_kv": shape.width // shape.tower_heads,
            },
            lambda _: make.described_patches(shape, 3 * shape.small**2),
            tokens=0,
            beside=make.encoder_only,
            text=False,
        ),
        "pp_formulanet": Family(
            {
                "vision_config.output_channels": shape.tower,
                "vision_config.post_conv_in_channels": shape.tower,
                "vision_config.post_conv_mid_channels": shape.tower,
                "vision_config.post_conv_out_channels": shape.tower,
                "vision_config.decoder_hidden_size": shape.width,
                "vision_config.image_size": 64,
            },
            tokens=0,
            beside=make.encoder_only,
            text=False,
        ),
        "vision-encoder-decoder": Family(
            {"encoder.image_size": shape.side, "encoder.patch_size": shape.patch, "decoder.is_decoder": True}
            | {"decoder.add_cross_attention": True},
            tokens=0,
            beside=make.encoder_only,
            text=False,
        ),
        "kosmos-2": Family({"latent_query_num": 4}, tokens=4, beside=make.marked(shape.image), text=False),
        "kosmos-2.5": Family(
            {
                "latent_query_num": 4,
                "vision_config.patch_embed_hidden_size": 3 * shape.small**2,
                "vision_config.max_num_patches": 64,
            },
            lambda _: make.described_patches(shape, 3 * shape.small**2),
            tokens=4,
            beside=make.marked(shape.image),
        ),
        "idefics": Family(
            {"vision_config.embed_dim": shape.tower}, tokens=1, beside=make.seen_pictures(shape.image), text=False
        ),
        "evolla": Family(tokens=0),
        "pi0": Family(tokens=0),
        "blip-2": Family({"num_query_tokens": 4}, text=False),
        "instructblip": Family({"num_query_tokens": 4}, tokens=4, beside=make.questions, text=False),
        "instructblipvideo": Family(
            {"num_query_tokens": 4, "video_token_index": shape.image},
            lambda _: make.stacked(shape.side, frames=4),
            tokens=16,
            beside=make.questions,
            text=False,
        ),
        "t5gemma2": Family({"encoder.mm_tokens_per_image": shape.patches // 4}, tokens=shape.patches // 4),
    }
